//! A run as one page of HTML that needs nothing else.

use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::history::History;
use crate::rows::{NeighbourReport, RowReport};
use crate::summary::Summary;

const STYLE: &str = include_str!("report.css");
/// Tokens that the page has a row for.
const MOST_ROWS: usize = 1000;

/// An option of the command and its value.
pub(crate) type OptionLine = (String, String);

/// The page of a training run. Every string is escaped; nothing is loaded from elsewhere.
pub(crate) fn page(summary: &Summary, history: &History, options: &[OptionLine]) -> Result<String> {
    let charts = history.charts();
    let charts = charts
        .iter()
        .map(|chart| Ok((chart.title.as_str(), chart.svg()?)))
        .collect::<Result<Vec<_>>>()?;
    let title = format!("{} rows trained", summary.rows_trained);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                // An empty icon: a browser asks for one otherwise.
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (title) }
                    p { (summary.adapter.display().to_string()) }
                }
                main {
                    (losses(summary))
                    (dead(summary))
                    section { h2 { "Curves" } div.charts {
                        @for (name, svg) in &charts {
                            figure aria-label=(name) { (PreEscaped(svg)) }
                        }
                    } }
                    (tokens(&summary.tokens, summary))
                    section { h2 { "Summary" } (pairs("summary", &summary.lines())) }
                    (options_table(options))
                }
                footer { "trainable-tokens " (env!("CARGO_PKG_VERSION")) }
            }
        }
    };
    Ok(page.into_string())
}

/// What counts most, large.
fn losses(summary: &Summary) -> Markup {
    let numbers = [
        ("loss before", format!("{:.4}", summary.loss_before)),
        ("loss after", format!("{:.4}", summary.loss_after)),
        ("steps", summary.steps.to_string()),
        (
            "rows",
            format!("{} of {}", summary.rows_trained, summary.vocab_size),
        ),
        ("per step", format!("{:.3} s", summary.seconds_per_step)),
    ];
    html! {
        section {
            div.numbers {
                @for (name, value) in numbers { div { strong { (value) } span { (name) } } }
            }
            p.note { "Loss of the " (summary.loss_of) ", in nats." }
        }
    }
}

fn dead(summary: &Summary) -> Markup {
    html! {
        @if !summary.dead_tokens.is_empty() {
            section.warning {
                h2 { "Rows that no step reached" }
                ul {
                    @for token in &summary.dead_tokens {
                        li { (name(token.token_id, token.token.as_deref())) " — " (token.reason) }
                    }
                }
            }
        }
    }
}

fn tokens(rows: &[RowReport], summary: &Summary) -> Markup {
    let is_dead = |row: &RowReport| {
        summary
            .dead_tokens
            .iter()
            .any(|dead| dead.token_id == row.token_id)
    };
    html! {
        section {
            h2 { "Tokens" }
            div.scroll { table #tokens {
                thead { tr {
                    th { "token" } th.number { "id" } th.number { "norm before" } th.number { "norm" }
                    th.number { "drift" } th.number { "cosine" } th { "nearest before" } th { "nearest" } th { "reached" }
                } }
                tbody {
                    @for row in rows.iter().take(MOST_ROWS) {
                        tr {
                            td { (name(row.token_id, row.token.as_deref())) }
                            td.number { (row.token_id) }
                            td.number { (format!("{:.4}", row.norm_before)) }
                            td.number { (format!("{:.4}", row.norm)) }
                            td.number { (format!("{:.4}", row.drift)) }
                            td.number { (row.cosine.map_or_else(|| "–".to_owned(), |cosine| format!("{cosine:.4}"))) }
                            td { (near(&row.neighbours_before)) }
                            td { (near(&row.neighbours)) }
                            @if is_dead(row) { td.dead { "dead" } } @else { td { "yes" } }
                        }
                    }
                }
            } }
            @if rows.len() > MOST_ROWS {
                p.note { "and " (rows.len() - MOST_ROWS) " more" }
            }
            p.note {
                "Drift is the L2 distance from where the row started, cosine that of the angle between the two. Nearest are the "
                "rows of the table with the largest cosine to this one."
            }
        }
    }
}

fn name(id: u32, token: Option<&str>) -> Markup {
    html! {
        @match token {
            Some(token) => code { (token) },
            None => span { "#" (id) },
        }
    }
}

fn near(neighbours: &[NeighbourReport]) -> Markup {
    html! {
        @if neighbours.is_empty() { "–" }
        span.near {
            @for near in neighbours {
                span title=(format!("token id {}", near.token_id)) {
                    (name(near.token_id, near.token.as_deref()))
                    small { (format!("{:.2}", near.cosine)) }
                }
            }
        }
    }
}

fn pairs(id: &str, lines: &[(&str, String)]) -> Markup {
    html! {
        div.scroll { table #(id) { tbody {
            @for (name, value) in lines { tr { th scope="row" { (name) } td { (value) } } }
        } } }
    }
}

fn options_table(options: &[OptionLine]) -> Markup {
    html! {
        section {
            h2 { "Options" }
            div.scroll { table #options {
                tbody {
                    @for (name, value) in options {
                        tr { th scope="row" { code { "--" (name) } } td { (value) } }
                    }
                }
            } }
        }
    }
}
