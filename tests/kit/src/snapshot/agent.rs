//! A guest's agent that does what a test tells it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::is_held;
use crate::wait::wait_until;

/// What the agent does with a freeze.
#[derive(Clone, Debug, PartialEq)]
pub enum Mood {
    /// Freezes.
    Good,
    /// Answers nothing, not even a sync.
    Silent,
    /// Says yes to everything with what is no answer.
    MalformedInput,
    /// Sends what earlier clients asked for before it answers.
    Stale,
    /// Freezes after this long.
    Late(Duration),
    /// Says no.
    Refuses,
    /// Freezes and drops the connection instead of an answer.
    Dies,
    /// Freezes, and another client thaws at once.
    ThawsEarly,
    /// Windows' agent (qga/commands-win32.c, qga/vss-win32/requester.cpp). The status is a flag of the agent's own: `frozen`
    /// from `qmp_guest_fsfreeze_freeze` until `qmp_guest_fsfreeze_thaw`, also once VSS lets writes go. That shows in the
    /// thaw alone: it fails, clears the flag, and thaws (`requester_thaw`, VSS_E_HOLD_WRITES_TIMEOUT).
    Windows {
        /// VSS holds writes for so long.
        holds: Duration,
        /// The thaw fails after that.
        admits: bool,
    },
    /// Refuses to freeze, since another client froze after our check: every command but a few is disabled then
    /// (qga/main.c, `ga_set_frozen`).
    FrozenMeanwhile,
    /// Thaws after this long.
    LateThaw(Duration),
    /// Thaws, but its hook fails then.
    ThawHookFails,
    /// Its hook fails always: it refuses to freeze, and complains when it thaws.
    HooksFail,
}

#[derive(Debug)]
struct State {
    mood: Mood,
    frozen: bool,
    frozen_at: Instant,
    /// Every command but syncs.
    asked: Vec<String>,
    /// The disks were held when a thaw came.
    held_at_thaw: bool,
    /// A disk was held when a freeze came.
    held_at_freeze: bool,
    filesystems: Value,
    count: u64,
    cmdline: Option<&'static str>,
}

/// A guest's agent on a socket that serves one client after the other, as QEMU's do.
pub struct Agent {
    state: Arc<(Mutex<State>, Condvar)>,
    pub path: PathBuf,
    /// Freezes and thaws go here, a line each.
    journal: PathBuf,
    _dir: tempfile::TempDir,
}

impl Agent {
    /// `controls`: of the guest's disks, which must not be held while it thaws; and while one is, a freeze hangs, as in a
    /// guest that must write for it.
    pub fn start(mood: Mood, controls: &[PathBuf]) -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qga");
        let journal = dir.path().join("journal");
        File::create(&journal).unwrap();
        let windows = json!([
            {"name": r"\\?\Volume{a}\", "mountpoint": r"C:\", "type": "NTFS"},
            {"name": r"\\?\Volume{b}\", "mountpoint": r"D:\", "type": "NTFS"},
            {"name": r"\\?\Volume{c}\", "mountpoint": "System Reserved", "type": "FAT32"},
        ]);
        let linux = json!([
            {"name": "vda1", "mountpoint": "/", "type": "ext4"}, {"name": "vda1", "mountpoint": "/mnt", "type": "ext4"},
            {"name": "vda15", "mountpoint": "/boot/efi", "type": "vfat"}, {"name": "vdb", "mountpoint": "/d", "type": "xfs"},
        ]);
        let filesystems = if matches!(mood, Mood::Windows { .. }) { windows } else { linux };
        let state = State {
            mood,
            frozen: false,
            frozen_at: Instant::now(),
            asked: Vec::new(),
            held_at_thaw: false,
            held_at_freeze: false,
            filesystems,
            count: 2,
            cmdline: None,
        };
        let state = Arc::new((Mutex::new(state), Condvar::new()));
        let listener = UnixListener::bind(&path).unwrap();
        let served = Served { state: state.clone(), controls: controls.to_vec(), journal: journal.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                served.serve(stream.unwrap());
            }
        });
        Agent { state, path, journal, _dir: dir }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.0.lock().unwrap()
    }

    pub fn set(&self, mood: Mood) {
        self.lock().mood = mood;
    }

    pub fn set_frozen(&self) {
        self.lock().frozen = true;
    }

    /// Of the two filesystems that can be frozen, it freezes so many.
    pub fn set_count(&self, count: u64) {
        self.lock().count = count;
    }

    /// What it lists as its filesystems.
    pub fn set_filesystems(&self, list: Value) {
        self.lock().filesystems = list;
    }

    /// It tells its own command line (words end with NUL); else it has its file commands blocked.
    pub fn set_cmdline(&self, line: &'static str) {
        self.lock().cmdline = Some(line);
    }

    pub fn is_frozen(&self) -> bool {
        self.lock().frozen
    }

    pub fn asked(&self, command: &str) -> usize {
        self.lock().asked.iter().filter(|asked| *asked == command).count()
    }

    pub fn wait_for(&self, command: &str) {
        wait_until(command, || self.asked(command) > 0);
    }

    pub fn held_at_thaw(&self) -> bool {
        self.lock().held_at_thaw
    }

    /// A freeze came while a disk was held.
    pub fn held_at_freeze(&self) -> bool {
        self.lock().held_at_freeze
    }

    /// The file to which freezes and thaws are written; hooks and commands of a test may add their lines.
    pub fn journal(&self) -> &Path {
        &self.journal
    }

    pub fn journaled(&self) -> Vec<String> {
        fs::read_to_string(&self.journal).unwrap().lines().map(str::to_owned).collect()
    }

    /// Waits until it is thawed and a thaw was asked for.
    pub fn wait_thawed(&self) {
        wait_until("the guest is thawed", || self.asked("guest-fsfreeze-thaw") > 0 && !self.is_frozen());
        assert!(!self.held_at_thaw(), "a thaw while a disk was held: it would hang in a real guest");
    }
}

/// The agent's thread.
struct Served {
    state: Arc<(Mutex<State>, Condvar)>,
    controls: Vec<PathBuf>,
    journal: PathBuf,
}

impl Served {
    fn serve(&self, mut stream: UnixStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        loop {
            let mut line = Vec::new();
            match lines.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let delimited = line.contains(&0xff);
            let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
            let Ok(request) = serde_json::from_slice::<Value>(&line[start..]) else { continue };
            let Some(answer) = self.answer(&request, delimited) else { continue };
            if answer.is_empty() || stream.write_all(&answer).is_err() {
                return;
            }
        }
    }

    /// `None`: nothing. Empty: the connection ends.
    fn answer(&self, request: &Value, delimited: bool) -> Option<Vec<u8>> {
        let line = |value: Value| Some(format!("{value}\n").into_bytes());
        let command = request["execute"].as_str().unwrap();
        let mut state = self.state.0.lock().unwrap();
        let mood = state.mood.clone();
        if mood == Mood::Silent {
            return None;
        }
        if command == "guest-sync-delimited" {
            assert!(delimited, "a sync without 0xFF before it");
            let mut bytes = Vec::new();
            if mood == Mood::Stale {
                bytes.extend(b"{\"return\": 1}\n\xff{\"return\": 123}\nnot JSON at all\n");
            }
            bytes.extend(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error, stray\"}}\n\xff");
            bytes.extend(line(json!({"return": request["arguments"]["id"]})).unwrap());
            return Some(bytes);
        }
        state.asked.push(command.to_owned());
        if mood == Mood::MalformedInput && command != "guest-fsfreeze-thaw" {
            return Some(b"yes\n".to_vec());
        }
        match command {
            "guest-fsfreeze-status" => line(json!({"return": if state.frozen { "frozen" } else { "thawed" }})),
            "guest-info" => line(json!({"return": {"version": "10.0.2", "supported_commands": [
                {"name": "guest-fsfreeze-freeze", "enabled": !state.frozen, "success-response": true}]}})),
            "guest-get-osinfo" if matches!(mood, Mood::Windows { .. }) => {
                line(json!({"return": {"id": "mswindows", "name": "Microsoft Windows"}}))
            }
            "guest-get-osinfo" => line(json!({"return": {"id": "debian", "name": "Debian GNU/Linux"}})),
            "guest-get-fsinfo" => line(json!({"return": state.filesystems})),
            "guest-fsfreeze-freeze" => {
                let pause = if let Mood::Late(pause) = mood { pause } else { Duration::ZERO };
                drop(state);
                std::thread::sleep(pause);
                self.wait_for_disks();
                self.freeze(&mood)
            }
            "guest-fsfreeze-thaw" => {
                let held = self.controls.iter().any(|control| is_held(control));
                state.held_at_thaw |= held;
                drop(state);
                if let Mood::LateThaw(pause) = mood {
                    std::thread::sleep(pause);
                }
                let mut state = self.state.0.lock().unwrap();
                let count = if std::mem::take(&mut state.frozen) { state.count } else { 0 };
                self.write("thaw");
                if let Mood::Windows { holds, admits: true } = mood
                    && count > 0
                    && state.frozen_at.elapsed() > holds
                {
                    // `error_set_win32` adds the system's words, of which there are none for VSS.
                    let desc = "couldn't hold writes: fsfreeze is limited up to 10 seconds: ";
                    return line(json!({"error": {"class": "GenericError", "desc": desc}}));
                }
                if matches!(mood, Mood::ThawHookFails | Mood::HooksFail) {
                    return line(json!({"error": {"class": "GenericError", "desc": "thaw hook exited with 4"}}));
                }
                line(json!({"return": count}))
            }
            _ => line(file(command, request, state.cmdline)),
        }
    }

    fn wait_for_disks(&self) {
        while self.controls.iter().any(|control| control.exists() && is_held(control)) {
            self.state.0.lock().unwrap().held_at_freeze = true;
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn freeze(&self, mood: &Mood) -> Option<Vec<u8>> {
        let mut state = self.state.0.lock().unwrap();
        if matches!(mood, Mood::Refuses | Mood::HooksFail) {
            let error = json!({"error": {"class": "GenericError", "desc": "hook script exited with 3"}});
            return Some(format!("{error}\n").into_bytes());
        }
        if *mood == Mood::FrozenMeanwhile {
            state.frozen = true;
            let desc = "Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state";
            return Some(format!("{}\n", json!({"error": {"class": "CommandNotFound", "desc": desc}})).into_bytes());
        }
        state.frozen = *mood != Mood::ThawsEarly;
        state.frozen_at = Instant::now();
        self.write("freeze");
        self.state.1.notify_all();
        if *mood == Mood::Dies {
            return Some(Vec::new());
        }
        Some(format!("{}\n", json!({"return": state.count})).into_bytes())
    }

    fn write(&self, text: &str) {
        let mut journal = File::options().append(true).open(&self.journal).unwrap();
        writeln!(journal, "{text}").unwrap();
    }
}

/// The file commands, for the one file that is asked for.
fn file(command: &str, request: &Value, cmdline: Option<&str>) -> Value {
    let refused = json!({"error": {"class": "CommandNotFound", "desc": "the command is not allowed"}});
    let Some(cmdline) = cmdline else { return refused };
    match command {
        "guest-file-open" if request["arguments"]["path"] == "/proc/self/cmdline" => json!({"return": 7}),
        "guest-file-open" => json!({"error": {"class": "GenericError", "desc": "No such file or directory"}}),
        "guest-file-read" => {
            json!({"return": {"count": cmdline.len(), "buf-b64": BASE64.encode(cmdline), "eof": true}})
        }
        "guest-file-close" => json!({"return": {}}),
        _ => refused,
    }
}
