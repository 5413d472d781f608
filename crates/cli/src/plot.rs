//! Curves as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::element::{EmptyElement, PathElement};
use plotters::prelude::{
    ChartBuilder, Circle, DrawingArea, IntoDrawingArea, LineSeries, RGBColor, SVGBackend,
    SeriesLabelPosition, WHITE,
};
use plotters::series::PointSeries;
use plotters::style::{Color, TRANSPARENT};

const WIDTH: u32 = 720;
const HEIGHT: u32 = 320;
/// Colours that are told apart with any eyes, on white as on black (Wong, Nature Methods 8, 441; 2011), and some more.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(127, 127, 127),
    RGBColor(23, 190, 207),
];

/// Curves over the steps of a run.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    pub(crate) title: String,
    unit: String,
    series: Vec<Series>,
}

/// One curve, as (step, value).
#[derive(Clone, Debug)]
pub(crate) struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    marked: bool,
}

impl Series {
    pub(crate) fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_owned(),
            points: points.into_iter().filter(|(_, y)| y.is_finite()).collect(),
            marked: false,
        }
    }

    /// Each point gets a dot too.
    pub(crate) fn marked(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            marked: true,
            ..Self::line(name, points)
        }
    }
}

impl Chart {
    pub(crate) fn new(title: &str, unit: &str, series: Vec<Series>) -> Self {
        Self {
            title: title.to_owned(),
            unit: unit.to_owned(),
            series,
        }
    }

    /// The chart alone, on nothing, to lie in a page.
    pub(crate) fn svg(&self) -> Result<String> {
        drawn(HEIGHT, |root| self.draw(root))
    }

    fn draw(&self, area: &Area<'_>) -> DrawResult {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let last = points().map(|(step, _)| *step).fold(1.0, f64::max);
        let lowest = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
        let highest = points().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
        let (lowest, highest) = if lowest <= highest {
            (lowest, highest)
        } else {
            (0.0, 1.0)
        };
        // Values near 0, or all alike, are shown from 0.
        let bottom = if lowest >= 0.0 && lowest < 0.5 * highest || lowest == highest {
            lowest.min(0.0)
        } else {
            lowest
        };
        let room = 0.05 * (highest - bottom).max(1e-12);
        let bottom = if bottom == 0.0 { 0.0 } else { bottom - room };
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 17))
            .margin(10)
            .margin_right(18)
            .x_label_area_size(34)
            .y_label_area_size(66)
            .build_cartesian_2d(0.0..last, bottom..highest + room)?;
        let shown = |y: &f64| number(*y);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(128, 128, 128).mix(0.25))
            .axis_style(RGBColor(128, 128, 128))
            .x_labels(8)
            .y_labels(6)
            .x_desc("step")
            .y_desc(&self.unit)
            .x_label_formatter(&|x| format!("{x}"))
            .y_label_formatter(&shown)
            .label_style(("sans-serif", 13))
            .axis_desc_style(("sans-serif", 13))
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(series.points.iter().copied(), style))?
                .label(short(&series.name))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
            if series.marked || series.points.len() == 1 {
                let dot = |at, size, style| EmptyElement::at(at) + Circle::new((0, 0), size, style);
                chart.draw_series(PointSeries::of_element(
                    series.points.iter().copied(),
                    3,
                    colour.filled(),
                    &dot,
                ))?;
            }
        }
        if self.series.len() > 1 {
            let ends = self.series.iter().filter_map(|series| series.points.last());
            let above = ends
                .clone()
                .filter(|(_, y)| *y > f64::midpoint(bottom, highest))
                .count();
            let position = if 2 * above > ends.count() {
                SeriesLabelPosition::LowerRight
            } else {
                SeriesLabelPosition::UpperRight
            };
            chart
                .configure_series_labels()
                .position(position)
                .label_font(("sans-serif", 13))
                .background_style(WHITE.mix(0.8))
                .border_style(RGBColor(128, 128, 128).mix(0.5))
                .draw()?;
        }
        Ok(())
    }
}

/// Charts below each other, on white, as a file of their own.
pub(crate) fn charts_svg(charts: &[Chart]) -> Result<String> {
    let count = u32::try_from(charts.len()).unwrap_or(1).max(1);
    drawn(HEIGHT * count, |root| {
        root.fill(&WHITE)?;
        for (area, chart) in root.split_evenly((charts.len().max(1), 1)).iter().zip(charts) {
            chart.draw(area)?;
        }
        Ok(())
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

fn drawn(height: u32, draw: impl FnOnce(&Area<'_>) -> DrawResult) -> Result<String> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    let outcome = draw(&root).and_then(|()| Ok(root.present()?));
    drop(root);
    outcome.map_err(|error| anyhow!("cannot draw the curves: {error}"))?;
    Ok(svg)
}

/// A name that a legend has room for.
fn short(name: &str) -> String {
    const LONGEST: usize = 24;
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

/// A number of few digits.
fn number(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-3 || value.abs() >= 1e5) {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" {
        "0".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_of_anything_are_drawn_and_escaped() {
        let curves = [
            vec![],
            vec![(1.0, 0.0)],
            vec![(1.0, 3.0), (2.0, 3.0)],
            vec![(1.0, -2.0), (2.0, f64::NAN), (3.0, 1e9)],
            vec![(1.0, 1e-9), (2.0, 2e-9)],
        ];
        for points in curves {
            let series = vec![
                Series::line("\"<a>&</a>\"", points.clone()),
                Series::marked("b", points.clone()),
            ];
            let svg = Chart::new("<title>", "y", series).svg().unwrap();
            assert!(
                svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
                "{points:?}"
            );
            assert!(
                !svg.contains("<a>") && svg.contains("&lt;a&gt;&amp;"),
                "{points:?}: {svg}"
            );
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{points:?}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.02, 1.5, 120.0, 1e-5, 3e6, -0.25].map(number);
        assert_eq!(shown, ["0", "0.02", "1.5", "120", "1.0e-5", "3.0e6", "-0.25"]);
    }
}
