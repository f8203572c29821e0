//! A guest that is frozen for snapshots that others take of its real Ceph images, and snapshots of ours that Ceph makes:
//! `virtioblkctl attend` and `virtioblkctl snapshot` between real servers, a real cluster, and an agent that does what the
//! test tells it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Output, Stdio};

use kit::ceph::{Cluster, Image, POOL, serve};
use kit::driver::pairs::{PairWriter, USED, are_of_one_instant, newest};
use kit::guest::{Server, scratch, sparse_image, tell, wait_until};
use kit::snapshot::{Agent, Mood, ctl, err};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A guest with two disks in one group of images, attended.
struct Scene<'a> {
    images: [Image<'a>; 2],
    servers: [Server; 2],
    agent: Agent,
    group: String,
    attendant: Child,
    lines: BufReader<ChildStdout>,
}

impl<'a> Scene<'a> {
    fn new(cluster: &'a Cluster, mood: Mood, more: &[&str]) -> Scene<'a> {
        let images = [cluster.image(1 << 20), cluster.image(1 << 20)];
        let group = format!("{POOL}/group-of-{}", images[0].name());
        cluster.rbd(&["group", "create", &group]);
        for image in &images {
            cluster.rbd(&["group", "image", "add", &group, &image.spec]);
        }
        // `rbd group snap create` takes the lock of each image for itself, and is refused by who keeps it.
        let lock = ["--rbd-lock", "none"];
        let servers = [serve(&images[0], "writeback", &lock), serve(&images[1], "none", &lock)];
        let agent = Agent::start(mood, &[servers[0].control(), servers[1].control()]);
        let mut command = ctl();
        command.args(["--json", "attend", "--level", "filesystem"]).args(more).arg("--qga").arg(&agent.path);
        command.args(servers.iter().flat_map(|server| ["--disk".into(), server.control()]));
        let mut attendant = command.stdout(Stdio::piped()).spawn().expect("virtioblkctl");
        let lines = BufReader::new(attendant.stdout.take().expect("piped"));
        let scene = Scene { images, servers, agent, group, attendant, lines };
        wait_until("the disks are attended", || {
            scene.servers.iter().all(|it| it.status()["attendant"]["present"] == true)
        });
        scene
    }

    fn take_group(&self, cluster: &Cluster, name: &str) -> Output {
        cluster.try_rbd(&["group", "snap", "create", &format!("{}@{name}", self.group)])
    }

    fn receipt(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).expect("JSON")
    }

    fn is_over(&self) {
        wait_until("nothing is held", || self.servers.iter().all(|it| it.status()["quiesce"]["closed-ms"].is_null()));
        wait_until("the guest is thawed", || !self.agent.is_frozen());
        assert!(!self.agent.held_at_freeze() && !self.agent.held_at_thaw(), "that would hang in a real guest");
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        // Both fail only if it is gone.
        let _ = self.attendant.kill();
        let _ = self.attendant.wait();
    }
}

#[test]
fn a_group_snapshot_over_two_servers_freezes_once_while_both_are_written() {
    let cluster = Cluster::shared();
    let mut scene = Scene::new(cluster, Mood::Good, &[]);
    let writer = PairWriter::start([scene.servers[0].socket(), scene.servers[1].socket()]);
    wait_until("pairs are written", || writer.written() > 20);
    for round in 1..=3 {
        let taken = scene.take_group(cluster, &format!("s{round}"));
        assert!(taken.status.success(), "{}", err(&taken));
        let receipt = scene.receipt();
        assert_eq!((&receipt["level"], &receipt["warnings"]), (&json!("filesystem"), &json!([])), "{receipt}");
        scene.is_over();
        assert_eq!(scene.agent.journaled().len(), 2 * round, "one freeze and one thaw for both disks");
    }
    drop(writer);
    let listed = cluster.rbd(&["group", "snap", "ls", &scene.group]);
    assert!((1..=3).all(|round| listed.contains(&format!("s{round}"))), "{listed}");
}

/// The attendant finds its disks again after an upgrade in place. Until it has, there is no weaker snapshot.
#[test]
fn an_upgrade_between_two_snapshots_costs_none_of_them_its_level() {
    let cluster = Cluster::shared();
    let mut scene = Scene::new(cluster, Mood::Good, &[]);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..6 {
        scene.servers[round % 2].upgrade(&[]);
        if round % 3 == 2 {
            let all = |scene: &Scene| scene.servers.iter().all(|it| it.status()["attendant"]["present"] == true);
            wait_until("the disks are attended again", || all(&scene));
        }
        let output = scene.take_group(cluster, &format!("u{round}"));
        if output.status.success() {
            let receipt = scene.receipt();
            assert_eq!(receipt["level"], "filesystem", "{receipt}");
            taken += 1;
        } else {
            assert!(round % 3 != 2 && err(&output).contains("busy"), "{}", err(&output));
            refused += 1;
        }
        scene.is_over();
        wait_until("both are attended", || scene.servers.iter().all(|it| it.status()["attendant"]["present"] == true));
    }
    tell(&format!("{taken} snapshots right after upgrades at their level, {refused} refused"));
}

#[test]
fn one_image_of_two_is_enough_and_an_agent_that_refuses_makes_it_fail_cleanly() {
    let cluster = Cluster::shared();
    let mut scene = Scene::new(cluster, Mood::Good, &["--freeze-timeout", "1s"]);
    let taken = scene.images[0].take_snapshot("one", &[]);
    assert!(taken.status.success(), "{}", err(&taken));
    assert_eq!(scene.receipt()["level"], "filesystem");
    for mood in [Mood::Refuses, Mood::Silent] {
        scene.agent.set(mood);
        for taken in [scene.images[1].take_snapshot("no", &[]), scene.take_group(cluster, "no")] {
            assert!(!taken.status.success());
            assert!(err(&taken).contains("busy"), "{}", err(&taken));
        }
        scene.agent.set(Mood::Good);
        scene.is_over();
    }
    assert!(!cluster.rbd(&["snap", "ls", &scene.images[1].spec]).contains("no"));
    assert!(!cluster.rbd(&["group", "snap", "ls", &scene.group]).contains("no"));
    let taken = scene.take_group(cluster, "yes");
    assert!(taken.status.success(), "{}", err(&taken));
    scene.is_over();
}

#[test]
fn an_attendant_that_is_killed_leaves_no_frozen_guest_and_no_weaker_snapshot() {
    let cluster = Cluster::shared();
    let mut scene = Scene::new(cluster, Mood::Late(std::time::Duration::from_secs(1)), &[]);
    let mut taking = cluster.rbd_command(&["group", "snap", "create", &format!("{}@no", scene.group)]).spawn().unwrap();
    scene.agent.wait_for("guest-fsfreeze-freeze");
    kill_process(Pid::from_child(&scene.attendant), Signal::KILL).unwrap();
    assert!(!taking.wait().unwrap().success());
    scene.attendant.wait().unwrap();
    scene.agent.wait_thawed();
    scene.is_over();
    let taken = scene.images[0].take_snapshot("no", &[]);
    assert!(!taken.status.success() && err(&taken).contains("busy"), "{}", err(&taken));
}

/// A file and an image, in this order or the other, in one snapshot.
#[test]
fn a_file_and_an_image_of_ceph_are_snapshotted_at_one_instant() {
    let cluster = Cluster::shared();
    for (mode, image_first) in [("writeback", true), ("none", false)] {
        let dir = scratch();
        let (image, file) = (cluster.image(1 << 20), sparse_image(dir.path(), 1 << 20));
        let of_image = serve(&image, mode, &[]);
        let of_file = Server::start(&file, mode.parse().expect("a mode"), &[]);
        let servers = if image_first { [&of_image, &of_file] } else { [&of_file, &of_image] };
        let writer = PairWriter::start(servers.map(Server::socket));
        wait_until("pairs are written", || writer.written() > 20);
        for round in 0..8 {
            let (before, copy) = (writer.written(), dir.path().join(format!("s{round}")));
            let ways = [format!("rbd:s{round}"), format!("copy:{}", copy.display())];
            let mut command = ctl();
            command.args(["--json", "snapshot", "--level", "crash"]);
            for (server, way) in [&of_image, &of_file].into_iter().zip(&ways) {
                command.arg("--disk").arg(server.control()).args(["--to", way]);
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", err(&output));
            let image = newest(&image.snapshot(&format!("s{round}"))[..USED]);
            let file = newest(&fs::read(copy).expect("a copy")[..USED]);
            let found = if image_first { [image, file] } else { [file, image] };
            assert!(are_of_one_instant(found), "{mode}: {found:?}");
            assert!(found[1] >= before, "{mode}: {before} was acknowledged on both, {found:?} is in the snapshot");
            wait_until("the writer goes on", || writer.written() > found[0]);
        }
    }
}

#[test]
fn our_own_snapshot_is_made_by_ceph_and_our_own_watch_is_not_asked() {
    let cluster = Cluster::shared();
    let images = [cluster.image(1 << 20), cluster.image(1 << 20)];
    let servers = [serve(&images[0], "writeback", &[]), serve(&images[1], "none", &[])];
    let writer = PairWriter::start([servers[0].socket(), servers[1].socket()]);
    let snapshot = |more: &[&str]| {
        let mut command = ctl();
        command.args(["--json", "snapshot", "--level", "crash"]).args(more);
        command.args(servers.iter().flat_map(|server| ["--disk".into(), server.control()]));
        command.output().unwrap()
    };
    wait_until("pairs are written", || writer.written() > 20);
    for round in 0..5 {
        let output = snapshot(&["--to", &format!("rbd:s{round}")]);
        assert!(output.status.success(), "{}", err(&output));
        let receipt: Value = serde_json::from_slice(&output.stdout).unwrap();
        for (at, image) in images.iter().enumerate() {
            assert_eq!(receipt["disks"][at]["target"], image.at(&format!("s{round}")));
        }
        let found = images.each_ref().map(|image| newest(&image.snapshot(&format!("s{round}"))[..USED]));
        assert!(are_of_one_instant(found) && found[0] > 0, "{found:?}");
    }
    // The second has one of this name: the first one's is removed again.
    images[1].cluster.rbd(&["snap", "create", "--skip-quiesce", &images[1].at("there")]);
    let output = snapshot(&["--to", "rbd:there"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(err(&output).contains("exists already"), "{}", err(&output));
    assert!(!cluster.rbd(&["snap", "ls", &images[0].spec]).contains("there"));
    drop(writer);
    for server in &servers {
        assert_eq!(server.status()["rbd"]["quiesce"]["asked"], 0, "only others ask");
    }
}
