//! What becomes of the data when an operator quiesces, and when the front-end or the daemon ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::driver::load::{LOAD_QUEUES, Load, PAGE, PAGES, SIZE, holds, write_numbers};
use crate::driver::{ALL, Driver, F_FLUSH};

pub fn a_quiesce_under_load_changes_no_byte_until_its_resume(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let load = Load::start(&served.socket);
        for round in 0..4 {
            load.wait_for(100);
            let token = served.ctl(&["quiesce", "--lease", "60s"]);
            let image = served.image();
            // What the driver has taken note of since is in there too: nothing was acknowledged while held.
            holds(&image, &load.acknowledged(), mode);
            std::thread::sleep(Duration::from_millis(30));
            assert!(served.image() == image, "{mode}: the image changed while it was held");
            // Sooner or later a write stands before each ring.
            let end = Instant::now() + WAIT_TIMEOUT;
            loop {
                let status = served.status();
                assert_eq!(status["quiesce"]["state"], "quiesced", "{mode}");
                if status["rings"].as_array().unwrap().iter().all(|ring| ring["held"] == true) {
                    break;
                }
                assert!(Instant::now() < end, "{mode}: {status}");
            }
            if round % 2 == 0 {
                served.ctl(&["resume", token.trim()]);
            } else {
                served.ctl(&["resume", "--all"]);
            }
        }
        // Held for as long as a command runs.
        let dir = crate::programs::disk_dir();
        let copy = dir.path().join("copy");
        load.wait_for(100);
        let before = load.acknowledged();
        let copying = served.store.copy_to(&copy);
        let copying = copying.iter().map(|word| word.to_str().unwrap());
        served.ctl(&["quiesce", "--"].into_iter().chain(copying).collect::<Vec<_>>());
        holds(&std::fs::read(&copy).unwrap(), &before, mode);
        load.wait_for(100);
        let acknowledged = load.stop();
        holds(&served.end(), &acknowledged, mode);
    }
}

pub fn a_daemon_told_to_end_under_load_keeps_everything_acknowledged(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let load = Load::start(&served.socket);
        load.wait_for(300);
        let image = served.end();
        // The driver may have found acknowledgements only after the end.
        std::thread::sleep(Duration::from_millis(20));
        holds(&image, &load.stop(), mode);
    }
}

pub fn a_held_daemon_told_to_end_writes_nothing_more(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let load = Load::start(&served.socket);
        load.wait_for(100);
        served.ctl(&["quiesce"]);
        let held = served.image();
        assert!(served.end() == held, "{mode}: a held write was carried out at the end");
        let acknowledged = load.stop();
        holds(&held, &acknowledged, mode);
    }
}

/// The front-end that [`a_killed_front_end_loses_nothing_acknowledged_and_the_next_is_served`] kills.
pub fn the_victim() {
    let socket = std::env::var_os("VICTIMS_SOCKET").expect("run by another test");
    let mut guest = Driver::connect_soon(Path::new(&socket), LOAD_QUEUES, 64, SIZE, ALL);
    // One line an acknowledgement; the pipe's end ends us, too.
    write_numbers(&mut guest, || false, |page, number| println!("\nacknowledged {page} {number}"));
}

pub fn a_killed_front_end_loses_nothing_acknowledged_and_the_next_is_served(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["the_victim", "--ignored", "--nocapture"])
            .env("VICTIMS_SOCKET", &served.socket)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut acknowledged = vec![0; PAGES];
        let mut count = 0;
        for line in BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok) {
            let mut words = line.split(' ');
            // A line that the kill cut short says too little, or names a smaller number, which is no less true.
            let (Some("acknowledged"), Some(Ok(page)), Some(Ok(number))) =
                (words.next(), words.next().map(str::parse::<usize>), words.next().map(str::parse::<u64>))
            else {
                continue;
            };
            acknowledged[page] = acknowledged[page].max(number);
            count += 1;
            if count == 500 {
                victim.kill().unwrap();
            }
        }
        assert!(!victim.wait().unwrap().success());
        assert!(count >= 500, "{mode}: the victim died by itself");
        served.wait_for("front-end disconnected");
        if mode != "unsafe" || served.store.shows_what_is_cached() {
            holds(&served.image(), &acknowledged, mode);
        }
        let mut guest = served.connect_again(1, 64, PAGE);
        assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 0, PAGE, id)), 0, "{mode}");
        served.total_at_rest();
        drop(guest);
        holds(&served.end(), &acknowledged, mode);
    }
}

pub fn each_front_end_is_served_by_the_features_it_negotiated(new_store: NewStore) {
    let served = Served::new(new_store, &[]);
    for round in 0..12u8 {
        let mask = if round % 2 == 0 { ALL } else { !F_FLUSH };
        let mut guest = Driver::connect_soon(&served.socket, 1 + usize::from(round % 3), 32, 8192, mask);
        guest.fill(0, &[round; 4096]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 0, 4096, id)), 0);
        let durable = served.ctl(&["status"]).contains("a write is acknowledged when durable");
        assert_eq!(durable, round % 2 == 1, "round {round}");
    }
    assert!(served.end()[4096..8192] == [11; 4096]);
}
