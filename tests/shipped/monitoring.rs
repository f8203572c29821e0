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

/// What the alerts say of samples, each of which lasts 20 minutes. `None`: promtool is not installed.
fn alerts(series: &str, alert: &str, disks: &[&str]) -> Option<()> {
    let directory = tempfile::tempdir().expect("room");
    let expected: Vec<String> = disks.iter().map(|labels| format!("{{exp_labels: {{{labels}}}}}")).collect();
    // promtool compares whole alerts, so the rules that it gets have no annotations.
    let rules = read("alerts.yml");
    let bare: Vec<&str> = rules
        .lines()
        .filter(|line| !["annotations:", "summary:", "description:"].iter().any(|key| line.trim().starts_with(key)))
        .collect();
    std::fs::write(directory.path().join("rules.yml"), bare.join("\n")).expect("room");
    let test = format!(
        "rule_files: [rules.yml]\nevaluation_interval: 1m\ntests:\n- interval: 1m\n  input_series:\n{series}  alert_rule_test:\n  - \
         {{eval_time: 20m, alertname: {alert}, exp_alerts: [{}]}}\n",
        expected.join(", ")
    );
    std::fs::write(directory.path().join("test.yml"), &test).expect("room");
    let Ok(output) =
        Command::new("promtool").args(["test", "rules", "test.yml"]).current_dir(directory.path()).output()
    else {
        kit::guest::tell("SKIPPED: promtool is not installed (scripts/install-test-deps metrics)");
        return None;
    };
    assert!(output.status.success(), "{test}: {output:?}");
    Some(())
}

/// A series that has one value.
fn series(sample: &str, value: &str) -> String {
    format!("  - {{series: '{sample}', values: '{value}x20'}}\n")
}

#[test]
fn the_alerts_fire_for_what_they_say_and_for_nothing_else() {
    let of = |disk: &str, mode: &str| format!("disk=\"{disk}\",mode=\"{mode}\"");
    let mut unsynced = String::new();
    for (disk, mode, age) in [
        ("never", "writeback", None),
        ("old", "writeback", Some("400")),
        ("new", "writeback", Some("2")),
        ("unsafe", "unsafe", None),
    ] {
        unsynced += &series(&format!("virtioblkd_unsynced_bytes{{{}}}", of(disk, mode)), "2000000000+0");
        if let Some(age) = age {
            unsynced +=
                &series(&format!("virtioblkd_last_sync_age_seconds{{{}}}", of(disk, mode)), &format!("{age}+0"));
        }
    }
    let fired = ["never", "old"].map(|disk| format!("disk: {disk}, mode: writeback, severity: warning"));
    let Some(()) = alerts(&unsynced, "VirtioblkdUnsynced", &fired.each_ref().map(String::as_str)) else { return };

    let mut states = String::new();
    for state in ["in-use", "idle", "held", "no-answer", "stale", "not-running", "no-permission", "no-control-socket"] {
        states += &series(&format!("virtioblkd_state{{disk=\"{state}\",state=\"{state}\"}}"), "1+0");
    }
    let fired = ["no-answer", "stale"].map(|disk| format!("disk: {disk}, severity: critical"));
    alerts(&states, "VirtioblkdDown", &fired.each_ref().map(String::as_str));

    // Two hosts have a disk of this name; the reads of one are slow, and those of the other are many.
    let mut reads = String::new();
    for (instance, fast, all) in [("slow", "0", "10"), ("fast", "100000", "100000")] {
        for (limit, count) in [("0.1", fast), ("2", all), ("+Inf", all)] {
            let labels = format!("instance=\"{instance}\",disk=\"vda\",kind=\"read\",le=\"{limit}\"");
            reads += &series(&format!("virtioblkd_request_duration_seconds_bucket{{{labels}}}"), &format!("0+{count}"));
        }
    }
    alerts(&reads, "VirtioblkdSlowReads", &["disk: vda, instance: slow, severity: warning"]);
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
