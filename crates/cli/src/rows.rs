//! Trained rows, as people look at them: how far they went, and what they are near to.

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use trainable_tokens_core::{DType, EmbeddingSource, Neighbour, TokenId, TokenRows, TokenSet, nearest_rows};

/// Tokens whose neighbours are looked for, the first ones: each is compared with the whole table.
const MOST_WITH_NEIGHBOURS: usize = 16;
/// Neighbours of each.
const NEIGHBOURS: usize = 5;
/// Rows that a table on a terminal shows.
const MOST_SHOWN: usize = 40;

/// A row before and after.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RowReport {
    pub(crate) token_id: u32,
    pub(crate) token: Option<String>,
    pub(crate) norm_before: f64,
    pub(crate) norm: f64,
    /// L2 distance of the two.
    pub(crate) drift: f64,
    /// Cosine of the two; null where one is zero.
    pub(crate) cosine: Option<f64>,
    /// The nearest rows by cosine, the nearest first; of the first tokens only.
    pub(crate) neighbours_before: Vec<NeighbourReport>,
    pub(crate) neighbours: Vec<NeighbourReport>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct NeighbourReport {
    pub(crate) token_id: u32,
    pub(crate) token: Option<String>,
    pub(crate) cosine: f64,
}

/// A table with rows of its own for some tokens.
struct Overridden<'a, S: ?Sized> {
    table: &'a S,
    tokens: &'a TokenSet,
    rows: &'a TokenRows,
}

impl<S: EmbeddingSource + ?Sized> EmbeddingSource for Overridden<'_, S> {
    type Error = S::Error;

    fn vocab_size(&self) -> usize {
        self.table.vocab_size()
    }

    fn embedding_dim(&self) -> usize {
        self.table.embedding_dim()
    }

    fn dtype(&self) -> DType {
        self.table.dtype()
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows, Self::Error> {
        let read = self.table.read_rows(ids)?;
        let slots = ids.iter().map(|id| self.tokens.slot(*id));
        let own: Vec<_> = (0..)
            .zip(slots)
            .filter_map(|(at, slot)| Some((at, slot?.0)))
            .collect();
        if own.is_empty() {
            return Ok(read);
        }
        let dim = self.embedding_dim();
        let (mut values, rows) = (read.to_f64_vec(), self.rows.to_f64_vec());
        for (at, slot) in own {
            let place: std::ops::Range<usize> = at * dim..(at + 1) * dim;
            values[place].copy_from_slice(&rows[slot * dim..(slot + 1) * dim]);
        }
        Ok(TokenRows::new::<f64>(values, ids.len(), dim)?)
    }
}

/// The rows of `ids` in `table`, `before` and `after`, both `[k, D]`.
pub(crate) fn row_reports<S>(
    table: &S,
    ids: &[TokenId],
    before: &TokenRows,
    after: &TokenRows,
    string: impl Fn(u32) -> Result<Option<String>>,
) -> Result<Vec<RowReport>>
where
    S: EmbeddingSource + Sync + ?Sized,
    S::Error: Send + Sync + 'static,
{
    let tokens = TokenSet::new(ids.iter().map(|id| id.0), table.vocab_size())?;
    let first = &ids[..ids.len().min(MOST_WITH_NEIGHBOURS)];
    let neighbours = |rows: &TokenRows| -> Result<Vec<Vec<NeighbourReport>>> {
        let source = Overridden {
            table,
            tokens: &tokens,
            rows,
        };
        let queries = source.read_rows(first)?;
        let found = nearest_rows(&source, first, &queries, NEIGHBOURS)?;
        let named = |Neighbour { id, cosine }: Neighbour| {
            Ok(NeighbourReport {
                token_id: id.0,
                token: string(id.0)?,
                cosine,
            })
        };
        found
            .into_iter()
            .map(|found| found.into_iter().map(named).collect())
            .collect()
    };
    let (mut near_before, mut near) = (neighbours(before)?.into_iter(), neighbours(after)?.into_iter());
    let dim = table.embedding_dim().max(1);
    let (old, new) = (before.to_f64_vec(), after.to_f64_vec());
    let pairs = ids.iter().zip(old.chunks_exact(dim).zip(new.chunks_exact(dim)));
    let reports = pairs.map(|(id, (old, new))| {
        let (norm_before, norm) = (norm(old), norm(new));
        let product: f64 = old.iter().zip(new).map(|(a, b)| a * b).sum();
        Ok(RowReport {
            token_id: id.0,
            token: string(id.0)?,
            norm_before,
            norm,
            drift: distance(old, new),
            cosine: Some(product / (norm_before * norm)).filter(|cosine| cosine.is_finite()),
            neighbours_before: near_before.next().unwrap_or_default(),
            neighbours: near.next().unwrap_or_default(),
        })
    });
    reports.collect()
}

/// The L2 norm of each row, and its distance from that of `start`.
pub(crate) fn norms_and_drifts(start: &TokenRows, rows: &TokenRows) -> (Vec<f64>, Vec<f64>) {
    let dim = rows.embedding_dim().max(1);
    let (old, new) = (start.to_f64_vec(), rows.to_f64_vec());
    let drifts = old.chunks_exact(dim).zip(new.chunks_exact(dim));
    (
        rows.row_norms(),
        drifts.map(|(old, new)| distance(old, new)).collect(),
    )
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

/// A token for people: its string, quoted so that spaces show, or its id.
pub(crate) fn token_name(id: u32, token: Option<&str>) -> String {
    token.map_or_else(|| format!("#{id}"), |token| format!("{token:?}"))
}

/// A table for a terminal: a header, and a dash where there is nothing. Numbers are in columns whose name starts with `#`.
pub(crate) fn text_table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.iter().map(|name| name.trim_start_matches('#')));
    for row in rows {
        // A control character would break the lines.
        table.add_row(row.iter().map(|cell| shown(cell)));
    }
    for (column, name) in table.column_iter_mut().zip(header) {
        column.set_padding((0, 2));
        if name.starts_with('#') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| format!("{}\n", line.trim_end()));
    lines.collect()
}

fn shown(cell: &str) -> String {
    let escape = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    if cell.is_empty() {
        "-".to_owned()
    } else {
        cell.chars().map(escape).collect()
    }
}

/// The table of trained rows.
pub(crate) fn rows_table(rows: &[RowReport]) -> String {
    let near = |neighbours: &[NeighbourReport]| {
        let names = neighbours
            .iter()
            .take(3)
            .map(|near| token_name(near.token_id, near.token.as_deref()));
        names.collect::<Vec<_>>().join(" ")
    };
    let cells = rows.iter().take(MOST_SHOWN).map(|row| {
        vec![
            row.token_id.to_string(),
            row.token
                .as_deref()
                .map_or_else(String::new, |token| format!("{token:?}")),
            format!("{:.4}", row.norm_before),
            format!("{:.4}", row.norm),
            format!("{:.4}", row.drift),
            row.cosine
                .map_or_else(String::new, |cosine| format!("{cosine:.4}")),
            near(&row.neighbours_before),
            near(&row.neighbours),
        ]
    });
    let header = [
        "#id",
        "token",
        "#norm before",
        "#norm",
        "#drift",
        "#cosine",
        "nearest before",
        "nearest",
    ];
    let mut text = text_table(&header, cells);
    if rows.len() > MOST_SHOWN {
        text += &format!("and {} more\n", rows.len() - MOST_SHOWN);
    }
    text
}
