//! The loss curve as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::{
    ChartBuilder, Circle, EmptyElement, IntoDrawingArea, LineSeries, RGBColor, SVGBackend, WHITE,
};
use plotters::series::PointSeries;

const TRAINING: RGBColor = RGBColor(31, 119, 180);
const HELD_OUT: RGBColor = RGBColor(214, 39, 40);

/// Draws the training loss of each step, and the held-out loss where it was measured, as (step, loss).
pub(crate) fn loss_svg(training: &[(f64, f64)], held_out: &[(f64, f64)]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, training, held_out).map_err(|error| anyhow!("cannot draw the loss curve: {error}"))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    training: &[(f64, f64)],
    held_out: &[(f64, f64)],
) -> Result<(), Box<dyn std::error::Error>> {
    let last = training
        .iter()
        .chain(held_out)
        .map(|(step, _)| *step)
        .fold(1.0, f64::max);
    let highest = training
        .iter()
        .chain(held_out)
        .map(|(_, loss)| *loss)
        .fold(0.1, f64::max);
    let root = SVGBackend::with_string(svg, (720, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("loss of the trained tokens", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..last, 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("cross-entropy (nats)")
        .draw()?;
    chart
        .draw_series(LineSeries::new(training.iter().copied(), &TRAINING))?
        .label("training batch")
        .legend(|(x, y)| plotters::element::PathElement::new([(x, y), (x + 18, y)], TRAINING));
    chart.draw_series(LineSeries::new(held_out.iter().copied(), &HELD_OUT))?;
    chart
        .draw_series(PointSeries::of_element(
            held_out.iter().copied(),
            4,
            &HELD_OUT,
            &|at, size, style| EmptyElement::at(at) + Circle::new((0, 0), size, style),
        ))?
        .label("held-out data")
        .legend(|(x, y)| plotters::element::PathElement::new([(x, y), (x + 18, y)], HELD_OUT));
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(TRAINING)
        .draw()?;
    root.present()?;
    Ok(())
}
