//! Draws bars in SVG: a panel for each case, a group for each mode, a bar for each server.

use std::fmt::Write;

pub struct Panel {
    pub title: &'static str,
    pub groups: Vec<Group>,
}

pub struct Group {
    pub name: &'static str,
    /// The values of the bars, in the order of the legend.
    pub values: Vec<f64>,
}

const WIDTH: usize = 860;
const PANEL: usize = 190;
const BARS: usize = 120;
const LEFT: usize = 20;
const HEAD: usize = 40;
/// Colours that colour-blind people can distinguish, and that differ in greyscale (Okabe and Ito).
const COLOURS: [&str; 3] = ["#0072b2", "#e69f00", "#999999"];

/// Draws all panels. Each panel has a scale of its own, and each bar shows its number.
pub fn draw(panels: &[Panel], legend: &[&str]) -> String {
    let height = HEAD + panels.len() * PANEL;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (at, (name, colour)) in legend.iter().zip(COLOURS).enumerate() {
        let x = LEFT + at * 170;
        rectangle(&mut svg, x as f64, 12.0, (12.0, 12.0), colour);
        text(&mut svg, (x + 18) as f64, 22.0, "start", name);
    }
    text(&mut svg, (WIDTH - LEFT) as f64, 22.0, "end", "requests per second");
    for (at, one) in panels.iter().enumerate() {
        panel(&mut svg, one, HEAD + at * PANEL);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, panel: &Panel, top: usize) {
    let most = panel.groups.iter().flat_map(|group| &group.values).copied().fold(1.0, f64::max);
    let floor = (top + 30 + BARS) as f64;
    let room = (WIDTH - 2 * LEFT) as f64 / panel.groups.len() as f64;
    writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{}</text>", top + 14, panel.title)
        .expect("a string");
    for (at, group) in panel.groups.iter().enumerate() {
        let left = LEFT as f64 + at as f64 * room;
        let bar = (room - 20.0) / group.values.len() as f64;
        for (number, (value, colour)) in group.values.iter().zip(COLOURS).enumerate() {
            let (x, tall) = (left + number as f64 * bar, value / most * BARS as f64);
            rectangle(svg, x, floor - tall, (bar - 4.0, tall), colour);
            text(svg, x + (bar - 4.0) / 2.0, floor - tall - 3.0, "middle", &short(*value));
        }
        text(svg, left + (room - 20.0) / 2.0, floor + 14.0, "middle", group.name);
    }
}

fn rectangle(svg: &mut String, x: f64, y: f64, (width, height): (f64, f64), colour: &str) {
    writeln!(svg, "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>")
        .expect("a string");
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>").expect("a string");
}

/// Formats a number: 950, 12.3k.
fn short(value: f64) -> String {
    if value < 1000.0 { format!("{value:.0}") } else { format!("{:.1}k", value / 1000.0) }
}
