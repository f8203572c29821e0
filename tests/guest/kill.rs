//! kill -9 of the server under a real guest's verified load, again and again: the guest notices a pause and nothing
//! else. Some writes are kept back on purpose (`--backend slow:MS`), so that many requests of each kind are in flight, and
//! answered out of order, when the server dies: without that a server that forgets them would not be noticed.
//!
//! VIRTIOBLKD_KILLS says how often (40; `make check-deep` asks for 200).

use std::time::{Duration, Instant};

use kit::guest;
use kit::guest::qemu::Vm;
use kit::guest::{Server, oracle, qemu, scratch, sparse_image, tell};
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;

const JOB: &str = concat!(include_str!("fio.sh"), include_str!("until_told.sh"));

struct World {
    server: Option<Server>,
    vm: Vm,
    image: std::path::PathBuf,
    options: [&'static str; 4],
    _dir: tempfile::TempDir,
}

impl World {
    fn new(backend: &'static str) -> World {
        let dir = scratch();
        let image = sparse_image(dir.path(), 16 * MIB);
        let options = ["--backend", backend, "--num-queues", "2"];
        let server = Server::start(&image, CacheMode::None, &options);
        let mut vm = qemu::linux_full(2, JOB).vhost_user_disk(&server.socket(), ",num-queues=2").start();
        vm.until_asked("stop");
        World { server: Some(server), vm, image, options, _dir: dir }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("there is one")
    }

    fn kill(&mut self) {
        let server = self.server.take().expect("there is one");
        self.server = Some(server.kill_and_start(&self.image, CacheMode::None, &self.options));
    }

    /// Whether each process writes on within `timeout` (fio's second process flushes).
    fn goes_on(&self, timeout: Duration) -> bool {
        let figures = || ["writes", "flushes"].map(|figure| self.server().total(figure));
        let before = figures();
        let end = Instant::now() + timeout;
        while figures().iter().zip(before).any(|(now, before)| *now < before + 2) {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

fn kills() -> u32 {
    std::env::var("VIRTIOBLKD_KILLS").map_or(40, |kills| kills.parse().expect("VIRTIOBLKD_KILLS is a number"))
}

#[test]
fn a_guest_outlives_every_kill_of_its_server() {
    let mut world = World::new("slow:30");
    let (mut owed, mut done_again) = (0, 0);
    for kill in 0..kills() {
        assert!(
            world.goes_on(guest::WAIT_TIMEOUT),
            "after {kill} kills the guest's I/O hangs: {}",
            world.server().status()
        );
        // At another moment each time.
        std::thread::sleep(Duration::from_millis(u64::from(kill * 37 % 60)));
        owed += u32::from(world.server().total("in-flight") > 0);
        done_again += u32::from(world.server().log().contains("are resubmitted"));
        world.kill();
    }
    assert!(world.goes_on(guest::WAIT_TIMEOUT));
    done_again += u32::from(world.server().log().contains("are resubmitted"));
    assert!(done_again > kills() / 2, "only {done_again} of {} servers had to do anything again", kills());
    world.vm.go();
    let sum = world.vm.until_asked("compare");
    assert_eq!(sum.last(), Some(&format!("{}  -", oracle::digest(&world.image))));
    world.vm.go();
    world.vm.finish();
    tell(&format!(
        "{} kills, no error in the guest; I/O was in flight at {owed}, seen at once by {done_again}",
        kills()
    ));
}

#[test]
fn a_server_that_forgets_in_flight_requests_is_found() {
    let mut world = World::new("forgetful:30");
    assert!(world.goes_on(guest::WAIT_TIMEOUT));
    let mut kills = 0;
    // QEMU and the guest need a moment to come back, and a busy machine longer.
    while world.goes_on(Duration::from_secs(20)) {
        kills += 1;
        assert!(kills < 10, "ten kills and no hang: this test would not notice a server that forgets");
        world.kill();
    }
    tell(&format!("a server without in-flight tracking hangs its guest after {kills} kills"));
}
