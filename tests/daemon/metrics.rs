//! `virtioblkctl exporter` and `stats --openmetrics`: real daemons, one that does not answer, promtool and a real Prometheus,
//! and clients that are slow, wrong or many.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kit::driver::{ALL, Driver};
use kit::programs;
use kit::wait::wait_until;
use rustix::process::Signal;
use serde_json::Value;

use super::names::Daemon;

/// A process that is killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ctl(directory: &Path) -> Command {
    let mut command = Command::new(programs::virtioblkctl());
    command.arg("--control-dir").arg(directory).current_dir(directory).stdin(Stdio::null());
    command.env_remove("VIRTIOBLK_CONTROL");
    command
}

/// An exporter on a port that the kernel chose, and its address.
fn exporter(directory: &Path) -> (Running, SocketAddr) {
    let mut command = ctl(directory);
    command.args(["exporter", "--listen", "127.0.0.1:0"]).stderr(Stdio::piped());
    let mut exporter = Running(command.spawn().expect("it runs"));
    let mut line = String::new();
    BufReader::new(exporter.0.stderr.take().expect("a pipe")).read_line(&mut line).expect("a line");
    let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("its address");
    let address = address.parse().expect("an address");
    (exporter, address)
}

/// Sends this and reads the whole reply.
fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    let _ = stream.write_all(request.as_bytes());
    let mut reply = Vec::new();
    // What it does not read it may reset.
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8(reply).expect("text")
}

fn get(address: SocketAddr, accept: &str) -> String {
    let reply = ask(address, &format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n"));
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    body.to_owned()
}

/// The value of the first sample whose line begins so.
fn sample(page: &str, start: &str) -> Option<f64> {
    page.lines().find(|line| line.starts_with(start))?.rsplit(' ').next()?.parse().ok()
}

/// Runs a program with this input; `None`: it is not installed.
fn piped(program: &str, arguments: &[&str], input: &str) -> Option<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        kit::guest::tell(&format!("SKIPPED: {program} is not installed (scripts/install-test-deps metrics)"));
        return None;
    };
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    Some(child.wait_with_output().expect("it ends"))
}

#[test]
fn the_metrics_of_all_disks_are_what_they_did_and_a_daemon_that_hangs_is_down() {
    let directory = tempfile::tempdir().expect("room");
    let _busy = Daemon::start(directory.path(), "busy");
    let silent = Daemon::start(directory.path(), "silent");
    let mut driver = Driver::connect_soon(&directory.path().join("busy.sock"), 1, 128, 4096, ALL);
    for at in 0..20 {
        driver.write(0, at * 4096, 0, 4096, at);
        driver.kick(0);
        while driver.wait(0).is_empty() {}
    }
    silent.signal(Signal::STOP);
    let (_exporter, address) = exporter(directory.path());
    let mut page = String::new();
    // On a loaded machine the good one may take longer than a second, too.
    wait_until("the good daemon answers in time", || {
        let began = Instant::now();
        page = get(address, "text/plain");
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        sample(&page, "virtioblkd_up{disk=\"busy\"") == Some(1.0)
    });
    assert_eq!(sample(&page, "virtioblkd_up{disk=\"silent\""), Some(0.0), "{page}");
    assert!(!page.contains("virtioblkd_size_bytes{disk=\"silent\""), "{page}");
    let labels = "disk=\"busy\",domain=\"\",mode=\"writeback\"";
    let of = |name: &str, more: &str| sample(&page, &format!("{name}{{{labels}{more}}}"));
    assert_eq!(of("virtioblkd_requests_total", ",kind=\"write\""), Some(20.0), "{page}");
    assert_eq!(of("virtioblkd_written_bytes_total", ""), Some(81_920.0));
    assert_eq!(of("virtioblkd_request_duration_seconds_count", ",kind=\"write\""), Some(20.0));
    assert_eq!(of("virtioblkd_request_duration_seconds_bucket", ",kind=\"write\",le=\"+Inf\""), Some(20.0));
    assert!(of("virtioblkd_request_duration_seconds_sum", ",kind=\"write\"") > Some(0.0));
    assert_eq!(of("virtioblkd_unsynced_bytes", ""), Some(81_920.0));
    assert_eq!((of("virtioblkd_stopped", ""), of("virtioblkd_connected", "")), (Some(0.0), Some(1.0)));
    assert!(page.contains("cache_mode=\"writeback\""), "{page}");
    let open = get(address, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    assert!(open.contains("# TYPE virtioblkd_requests counter") && open.ends_with("# EOF\n"), "{open}");
    // The same without a server.
    let printed =
        ctl(directory.path()).args(["--control", "busy", "stats", "--openmetrics"]).output().expect("it runs");
    let printed = String::from_utf8(printed.stdout).expect("text");
    assert!(printed.contains("virtioblkd_daemon_info{disk=\"busy\"") && !printed.contains("silent"), "{printed}");
    let all = ctl(directory.path()).args(["stats", "--prometheus"]).output().expect("it runs");
    let all = String::from_utf8(all.stdout).expect("text");
    assert!(all.contains("# TYPE virtioblkd_requests_total counter") && all.contains("silent"), "{all}");
    if let Some(output) = piped("promtool", &["check", "metrics"], &page) {
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn clients_that_are_slow_wrong_or_many_keep_nobody_from_the_metrics() {
    let directory = tempfile::tempdir().expect("room");
    let (_exporter, address) = exporter(directory.path());
    assert!(ask(address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    assert!(ask(address, "GET /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(ask(address, "\u{1}\u{2}\r\n\r\n").starts_with("HTTP/1.1 400"));
    assert!(ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
    assert_eq!(ask(address, &"x".repeat(1 << 20)), "", "a head without an end");
    // Silent clients take every place; each is given up.
    let silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).expect("it listens")).collect();
    wait_until("a client gets the metrics again", || {
        ask(address, "GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200")
    });
    drop(silent);
    assert!(get(address, "").contains("virtioblkd_disks 0\n"));
    let taken = ctl(directory.path()).args(["exporter", "--listen", &address.to_string()]).output().expect("it runs");
    assert!(!taken.status.success());
    assert!(String::from_utf8_lossy(&taken.stderr).contains("choose another --listen"), "{taken:?}");
}

#[test]
fn a_real_prometheus_scrapes_the_exporter() {
    let directory = tempfile::tempdir().expect("room");
    let _disk = Daemon::start(directory.path(), "vda");
    let (_exporter, address) = exporter(directory.path());
    let path = |name: &str| directory.path().join(name);
    let config = format!(
        "scrape_configs:\n- job_name: virtioblkd\n  scrape_interval: 1s\n  static_configs:\n  - targets: ['{address}']\n"
    );
    std::fs::write(path("prometheus.yml"), config).expect("room");
    // A free port: another process may take it in between, and then Prometheus ends with an error.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let mut command = Command::new("prometheus");
    command.arg("--config.file").arg(path("prometheus.yml")).arg("--storage.tsdb.path").arg(path("data"));
    command.arg(format!("--web.listen-address=127.0.0.1:{port}")).stdout(Stdio::null());
    command.stderr(std::fs::File::create(path("log")).expect("room"));
    let Ok(child) = command.spawn() else {
        return kit::guest::tell("SKIPPED: prometheus is not installed (scripts/install-test-deps metrics)");
    };
    let _prometheus = Running(child);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let query = |what: &str| -> Option<Value> {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
        let request = format!("GET /api/v1/query?query={what} HTTP/1.0\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        let body: Value = serde_json::from_str(reply.split_once("\r\n\r\n")?.1).ok()?;
        Some(body["data"]["result"][0].clone())
    };
    let value = |what: &str| query(what).and_then(|sample| Some(sample["value"][1].as_str()?.to_owned()));
    let log = || std::fs::read_to_string(path("log")).unwrap_or_default();
    wait_until("Prometheus has the disk's size", || {
        assert!(!log().contains("address already in use"), "{}", log());
        value("virtioblkd_size_bytes").as_deref() == Some("1048576")
    });
    let up = query("virtioblkd_up").expect("it was scraped");
    assert_eq!((&up["metric"]["disk"], &up["value"][1]), (&"vda".into(), &"1".into()), "{up}");
    assert_eq!(value("virtioblkd_request_duration_seconds_count").as_deref(), Some("0"));
    assert!(value("scrape_samples_scraped%20%3E%20100").is_some(), "all of the page was read");
}
