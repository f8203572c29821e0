//! What the daemon reports of stable writes.

use std::path::Path;

use kit::backend::image;
use kit::driver::{ALL, Driver};

const WRITE: usize = 4096;

/// Killed if the test fails before it has ended.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already, if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The real daemon: the option, the status, the statistics and the operator's page.
#[test]
fn the_daemon_reports_its_stable_writes() {
    let dir = kit::programs::disk_dir();
    let disk = image(dir.path(), "disk.img", 1 << 20);
    let path = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
    let daemon = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .args(["--socket-path", &path("sock"), "--control-path", &path("ctl"), "--stable-writes", "copy"])
        .arg("--blk-file")
        .arg(&disk)
        .spawn()
        .unwrap();
    let mut daemon = Daemon(daemon);
    let mut guest = Driver::connect_soon(Path::new(&path("sock")), 1, 64, 4 * WRITE, ALL);
    for turn in 0..3 {
        assert_eq!(guest.one(0, |guest, id| guest.write(0, turn * WRITE as u64, 0, WRITE, id)), 0);
    }
    let page = |command: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkctl"))
            .args(["--control", &path("ctl")])
            .args(command)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let status = page(&["status"]);
    assert!(status.contains("stable writes copy (copy): "), "{status}");
    let json: serde_json::Value = serde_json::from_str(&page(&["stats", "--json"])).unwrap();
    assert_eq!(json["stable-writes"]["copied-writes"], 3, "{json}");
    assert_eq!(json["stable-writes"]["copied-bytes"], 3 * WRITE);
    let json: serde_json::Value = serde_json::from_str(&page(&["status", "--json"])).unwrap();
    assert_eq!(json["stable-writes"]["in-effect"], "copy", "{json}");
    drop(guest);
    let pid = rustix::process::Pid::from_child(&daemon.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(daemon.0.wait().unwrap().success());
}
