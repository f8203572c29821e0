//! PURE. Writes metrics as OpenMetrics 1.0 or as Prometheus' text format 0.0.4, which differ in the names of counters and in
//! the type of info metrics.

use std::fmt::Write;

use virtioblkd::disk::LatencyHistogram;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Prometheus' text format 0.0.4, which node_exporter's textfile collector and `promtool check metrics` read.
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Gauge,
    /// Its samples end in `_total`.
    Counter,
    /// Its samples end in `_info` and have the value 1.
    Info,
    Histogram,
}

impl Kind {
    /// The end of the samples' names.
    fn suffix(self) -> &'static str {
        match self {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        }
    }
}

/// The upper limits of a histogram's buckets in nanoseconds, which are boundaries of the daemon's bins: from 8 us, two in each
/// power of two up to a millisecond, then one, up to 67 s.
const BUCKETS: [u64; 31] = {
    let mut buckets = [0; 31];
    let mut at = 0;
    while at < 15 {
        buckets[at] = (if at % 2 == 0 { 8000 } else { 12_000 }) << (at / 2);
        at += 1;
    }
    while at < 31 {
        buckets[at] = 1_024_000 << (at - 14);
        at += 1;
    }
    buckets
};

/// A page that is being written.
pub(super) struct Page {
    format: Format,
    text: String,
    /// The metric that is being written.
    name: &'static str,
    kind: Kind,
    /// The labels of the disk that is being written.
    labels: String,
}

impl Page {
    pub(super) fn new(format: Format) -> Self {
        Page { format, text: String::new(), name: "", kind: Kind::Gauge, labels: String::new() }
    }

    /// Begins a metric. `name` has no suffix.
    pub(super) fn metric(&mut self, name: &'static str, kind: Kind, help: &str) {
        (self.name, self.kind) = (name, kind);
        let (family, word) = match (self.format, kind) {
            (Format::OpenMetrics, Kind::Info) => (name.to_owned(), "info"),
            (Format::OpenMetrics, Kind::Counter) => (name.to_owned(), "counter"),
            (_, Kind::Counter) => (format!("{name}{}", kind.suffix()), "counter"),
            (_, Kind::Info) => (format!("{name}{}", kind.suffix()), "gauge"),
            (_, Kind::Gauge) => (name.to_owned(), "gauge"),
            (_, Kind::Histogram) => (name.to_owned(), "histogram"),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {family} {help}\n# TYPE {family} {word}");
    }

    /// Begins the samples of a disk.
    pub(super) fn disk(&mut self, labels: &[(&str, &str)]) {
        self.labels = joined("", labels);
    }

    /// Adds a sample.
    pub(super) fn sample(&mut self, more: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels = joined(&self.labels, more);
        self.line("", &labels, value);
    }

    /// Adds a sample that counts seconds.
    pub(super) fn milliseconds(&mut self, more: &[(&str, &str)], milliseconds: u64) {
        self.sample(more, milliseconds as f64 / 1e3);
    }

    /// Adds a histogram.
    pub(super) fn histogram(&mut self, more: &[(&str, &str)], histogram: &LatencyHistogram) {
        let labels = joined(&self.labels, more);
        for (limit, count) in BUCKETS.iter().zip(histogram.cumulative(&BUCKETS)) {
            let limit = (*limit as f64 / 1e9).to_string();
            self.line("_bucket", &joined(&labels, &[("le", &limit)]), count);
        }
        self.line("_bucket", &joined(&labels, &[("le", "+Inf")]), histogram.count());
        self.line("_sum", &labels, histogram.sum_ns as f64 / 1e9);
        self.line("_count", &labels, histogram.count());
    }

    fn line(&mut self, part: &str, labels: &str, value: impl std::fmt::Display) {
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = writeln!(self.text, "{}{part}{}{labels} {value}", self.name, self.kind.suffix());
    }

    /// The whole page.
    pub(super) fn finish(mut self) -> String {
        self.text.push_str("# EOF\n");
        self.text
    }
}

/// Labels in their form in a sample, behind `before`.
fn joined(before: &str, labels: &[(&str, &str)]) -> String {
    let mut text = before.to_owned();
    for (name, value) in labels {
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{name}=\"{}\"", escaped(value));
    }
    text
}

/// A label's value. A daemon, which may be an intruder's, says what is in it.
pub(super) fn escaped(value: &str) -> String {
    let mut text = String::new();
    for c in value.chars().take(256) {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c if c.is_control() => text.push('?'),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_names_counters_and_infos_in_its_way() {
        let page = |format| {
            let mut page = Page::new(format);
            page.metric("a", Kind::Counter, "A.");
            page.disk(&[("disk", "x\"\\\n\u{1b}")]);
            page.sample(&[("kind", "read")], 7);
            page.metric("b", Kind::Info, "B.");
            page.sample(&[], 1);
            page.finish()
        };
        let labels = r#"disk="x\"\\\n?""#;
        let samples = |counter: &str, info: &str, word: &str| {
            format!(
                "# HELP {counter} A.\n# TYPE {counter} counter\na_total{{{labels},kind=\"read\"}} 7\n# HELP {info} B.\n# TYPE \
                 {info} {word}\nb_info{{{labels}}} 1\n# EOF\n"
            )
        };
        assert_eq!(page(Format::Prometheus), samples("a_total", "b_info", "gauge"));
        assert_eq!(page(Format::OpenMetrics), samples("a", "b", "info"));
    }

    #[test]
    fn buckets_ascend_and_end_with_all_times() {
        assert!(BUCKETS.windows(2).all(|pair| pair[0] < pair[1]), "{BUCKETS:?}");
        assert_eq!(BUCKETS[..6], [8000, 12_000, 16_000, 24_000, 32_000, 48_000]);
        assert_eq!((BUCKETS[14], BUCKETS[15], BUCKETS[30]), (1_024_000, 2_048_000, 67_108_864_000));
        let mut page = Page::new(Format::OpenMetrics);
        page.metric("h_seconds", Kind::Histogram, "H.");
        let times = LatencyHistogram { sum_ns: 90_000_000_000, boundaries: vec![16_000, 20_000], bins: vec![0, 3, 1] };
        page.histogram(&[], &times);
        let text = page.finish();
        for line in [
            "h_seconds_bucket{le=\"0.000016\"} 0",
            "h_seconds_bucket{le=\"0.000024\"} 3",
            "h_seconds_bucket{le=\"67.108864\"} 3",
            "h_seconds_bucket{le=\"+Inf\"} 4",
            "h_seconds_sum 90",
            "h_seconds_count 4",
        ] {
            assert!(text.contains(&format!("{line}\n")), "no {line} in\n{text}");
        }
    }
}
