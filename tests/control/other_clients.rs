//! Clients that nobody here wrote: `qemu.qmp` (QEMU's own library, from PyPI) and socat. Each is skipped, and says so,
//! where it cannot be had.

use std::process::{Command, Stdio};

use kit::control::Served;

const QEMU_QMP: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main(path):
    qmp = QMPClient("test")
    await qmp.connect(path)
    assert qmp.greeting.QMP.version["qemu"]["major"] >= 0
    names = [command["name"] for command in await qmp.execute("query-commands")]
    assert "quiesce" in names, names
    answer = await qmp.execute("quiesce", {"timeout-ms": 5000, "who": "qemu.qmp"})
    assert answer["drained"] == 12, answer
    status = await qmp.execute("query-status")
    assert status["quiesce"]["state"] == "quiesced", status
    try:
        await qmp.execute("resume", {"token": "no such"})
        raise SystemExit("a wrong token was taken")
    except ExecuteError as error:
        assert "unknown" in str(error), error
    await qmp.execute("resume", {"token": answer["token"]})
    seen = [(await asyncio.wait_for(qmp.events.get(), 10))["event"] for _ in range(2)]
    assert seen == ["QUIESCED", "RESUMED"], seen
    many = await asyncio.gather(*[qmp.execute("query-version") for _ in range(30)])
    assert len(many) == 30
    await qmp.disconnect()
    print("qemu.qmp is content")

asyncio.run(main(sys.argv[1]))
"#;

fn skipped(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
}

#[test]
fn the_qemu_qmp_library_can_quiesce_and_resume() {
    let served = Served::new();
    let dir = tempfile::tempdir().unwrap();
    let install = Command::new("timeout")
        .args(["120", "python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"])
        .arg(dir.path())
        .arg("qemu.qmp==0.0.6")
        .output();
    match install {
        Err(error) => return skipped("qemu.qmp", &format!("no python3: {error}")),
        Ok(output) if !output.status.success() => {
            return skipped("qemu.qmp", &String::from_utf8_lossy(&output.stderr));
        }
        Ok(_) => {}
    }
    let mut python = Command::new("timeout");
    python.args(["60", "python3", "-c", QEMU_QMP]).arg(&served.path).env("PYTHONPATH", dir.path());
    let output = python.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("content"));
    assert_eq!(served.disk.closings(), 1);
    assert!(served.disk.closed().is_none());
}

#[test]
fn socat_can_quiesce_and_resume() {
    let served = Served::new();
    if Command::new("socat").arg("-V").stdout(Stdio::null()).status().is_err() {
        return skipped("socat", "it is not installed");
    }
    // As people type it: requests in a pipe whose end comes before the answers.
    let script = r#"echo '{"execute":"qmp_capabilities"} {"execute":"quiesce"} {"execute":"query-status"}' |
        timeout 20 socat -t 10 - UNIX-CONNECT:"$0""#;
    let output = Command::new("sh").args(["-c", script]).arg(&served.path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines[0]["QMP"].is_object());
    let replies: Vec<_> = lines[1..].iter().filter(|line| line["return"].is_object()).collect();
    assert_eq!(replies.len(), 3, "{text}");
    assert_eq!(replies[2]["return"]["quiesce"]["state"], "quiesced");
    // It could not have resumed any more, so its end let the disk go on.
    served.disk.wait_closed(false);
}
