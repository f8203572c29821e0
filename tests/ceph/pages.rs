//! The commands of docs/ceph.md, pasted as they stand: a disk in a real cluster, and an attendant that freezes its guest for a
//! snapshot that another client takes.

use kit::ceph::Cluster;
use kit::documents::{Terminal, blocks};
use kit::guest::{Qmp, wait_until};
use kit::snapshot::{Agent, Mood};
use serde_json::json;

const PAGE: &str = "docs/ceph.md";

/// The text of the page's block with this beginning.
fn block(start: &str) -> String {
    let found = blocks(PAGE).into_iter().find(|block| block.language == "sh" && block.text.starts_with(start));
    found.unwrap_or_else(|| panic!("{PAGE} has no block that begins with '{start}'")).text
}

#[test]
fn the_pages_commands_serve_an_image_and_freeze_its_guest_for_a_snapshot() {
    let cluster = Cluster::shared();
    cluster.ceph(&["osd", "pool", "create", "volumes"]);
    cluster.rbd(&["pool", "init", "volumes"]);
    for image in ["volumes/db", "volumes/other"] {
        cluster.rbd(&["create", "--size", "8M", image]);
    }
    let mut terminal = Terminal::default();
    let conf = cluster.conf();
    let environment = [("CEPH_CONF", conf.as_path())];
    let serve = block("mkdir -p run");
    terminal.start(&serve, &environment);
    // The same command, for the second disk that the page's attendant has.
    terminal.start(&serve.replace("vda", "vdb").replace("volumes/db", "volumes/other"), &environment);
    let controls = ["run/vda.ctl", "run/vdb.ctl"].map(|name| terminal.dir().join(name));
    wait_until("both disks are served", || controls.iter().all(|control| control.exists()));

    let agent = Agent::start(Mood::Good, &controls);
    std::os::unix::fs::symlink(&agent.path, terminal.dir().join("agent.sock")).expect("room");
    terminal.start(&block("virtioblkctl attend "), &environment);
    let is_attended = || {
        let status = |control| Qmp::connect(control).execute("query-status", json!({}));
        controls.iter().all(|control| status(control)["attendant"]["present"] == true)
    };
    wait_until("both disks are attended", is_attended);
    cluster.rbd(&["snap", "create", "volumes/db@monday"]);
    wait_until("the guest is thawed", || agent.journaled().len() == 2 && !agent.is_frozen());
    wait_until("the attendant says what was reached", || terminal.output().contains("level filesystem"));
}
