//! The alerts and the dashboard in qemu-configs/monitoring name metrics that exist, and Prometheus' own tools take them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-configs/monitoring").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(shipped(name)).expect("it is shipped")
}

/// Every metric of the exporter, by the names of its samples.
fn metrics() -> BTreeSet<String> {
    let directory = tempfile::tempdir().expect("room");
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    command.env_remove("VIRTIOBLK_CONTROL").arg("--control-dir").arg(directory.path()).args(["stats", "--prometheus"]);
    let page = String::from_utf8(command.output().expect("it runs").stdout).expect("text");
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let samples = types.flat_map(|(name, kind)| match kind {
        "histogram" => ["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")).to_vec(),
        _ => vec![name.to_owned()],
    });
    samples.collect()
}

/// The metrics that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("virtioblkd_")).map(str::to_owned).collect()
}

#[test]
fn the_alerts_and_the_dashboard_name_metrics_that_exist() {
    let metrics = metrics();
    assert!(metrics.len() > 30, "{metrics:?}");
    let dashboard: Value = serde_json::from_str(&read("grafana-dashboard.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let queries = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("queries"));
    let queries: Vec<&str> = queries.map(|target| target["expr"].as_str().expect("a query")).collect();
    assert!(queries.len() > 10 && dashboard["templating"]["list"][1]["name"] == "disk");
    for text in queries.into_iter().chain([read("alerts.yml").as_str()]) {
        let named = named(text);
        assert!(!named.is_empty(), "{text}");
        let unknown: Vec<_> = named.difference(&metrics).collect();
        assert!(unknown.is_empty(), "{unknown:?} in {text}");
    }
}

#[test]
fn the_page_about_monitoring_names_metrics_that_exist_and_all_of_them() {
    let page = kit::documents::read("docs/monitoring.md");
    let families = |names: BTreeSet<String>| -> BTreeSet<String> {
        let plain = |name: &str| {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            base.unwrap_or(name).to_owned()
        };
        names.iter().map(|name| plain(name)).collect()
    };
    let (known, shown) = (families(metrics()), families(named(&page)));
    let known: BTreeSet<String> = known.into_iter().filter(|name| name.starts_with("virtioblkd_")).collect();
    assert_eq!(shown, known);
}

#[test]
fn prometheus_takes_the_alerts_and_the_configuration() {
    for arguments in [["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]] {
        let mut command = Command::new("promtool");
        let Ok(output) = command.args(arguments).current_dir(shipped("")).output() else {
            return kit::guest::tell("SKIPPED: promtool is not installed (scripts/install-test-deps metrics)");
        };
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}
