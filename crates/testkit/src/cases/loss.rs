//! The cross-entropy of the head, without a matrix of all logits.

use trainable_tokens_core::{
    CrossEntropyOptions, ErrorKind, LogitsChunk, Overlap, Reduction, Softcap, TokenRows, TokenSet,
};

use crate::cases::head::{dense_gradients, product};
use crate::failure::{Exact, close, equal, refused_naming, same};
use crate::world::{World, for_all, noise, overwritten};
use crate::{Failure, Harness, HeadPass, Layer, LossPass, Outcome, Pass, allocated, failure::ensure};

/// A factor that every element type holds exactly.
const UPSTREAM: f64 = -2.5;

/// A loss to take: hidden states and their labels.
#[derive(Clone)]
struct Batch {
    hidden: TokenRows,
    labels: Vec<i64>,
    options: CrossEntropyOptions,
}

impl Batch {
    /// The ids of a world as labels, of which every third is ignored, but not the first.
    fn of<H: Harness>(world: &World) -> Self {
        let labels = world.ids.iter().enumerate();
        let labels = labels.map(|(at, id)| if at % 3 == 1 { -100 } else { i64::from(*id) });
        Self {
            hidden: noise(world.seed ^ 0x1055, H::DTYPE, world.ids.len(), world.d),
            labels: labels.collect(),
            options: CrossEntropyOptions::default(),
        }
    }

    fn with(&self, options: CrossEntropyOptions) -> Self {
        Self {
            options,
            ..self.clone()
        }
    }

    /// Each of the options once, for a world's labels.
    fn variants(&self) -> Result<Vec<Self>, Failure> {
        let last = self.labels.last().copied().filter(|last| *last != self.labels[0]);
        let mut all = vec![self.clone()];
        for (softcap, reduction, ignore_index) in [
            (None, Reduction::Sum, last),
            (Some(0.75), Reduction::Mean, last),
            (Some(30.0), Reduction::Sum, None),
        ] {
            all.push(self.with(CrossEntropyOptions {
                softcap: softcap.map(Softcap::new).transpose()?,
                reduction,
                ignore_index,
                ..self.options
            }));
        }
        Ok(all)
    }

    fn counts(&self, label: i64) -> bool {
        label != -100 && self.options.ignore_index != Some(label)
    }

    fn factor(&self) -> f64 {
        let count = self.labels.iter().filter(|label| self.counts(**label)).count();
        match self.options.reduction {
            Reduction::Mean => 1.0 / count as f64,
            Reduction::Sum => 1.0,
        }
    }

    /// The loss over a table by its definition, and its gradient of the logits, in `f64`.
    fn exact(&self, table: &TokenRows) -> Result<(f64, Exact), Failure> {
        let softcap = self.options.softcap.map(Softcap::get);
        let (mut loss, mut gradient) = (0.0, product(&self.hidden, table));
        for (at, label) in self.labels.iter().enumerate() {
            let row = gradient.row_mut(at);
            if !self.counts(*label) {
                row.fill(0.0);
                continue;
            }
            let label = usize::try_from(*label)?;
            let capped: Vec<f64> = row
                .iter()
                .map(|x| softcap.map_or(*x, |softcap| softcap * (x / softcap).tanh()))
                .collect();
            let sum: f64 = capped.iter().map(|x| x.exp()).sum();
            loss += self.factor() * (sum.ln() - capped[label]);
            for (column, x) in row.iter_mut().enumerate() {
                let slope = softcap.map_or(1.0, |softcap| 1.0 - (capped[column] / softcap).powi(2));
                let label = if column == label { 1.0 } else { 0.0 };
                *x = self.factor() * slope * (capped[column].exp() / sum - label);
            }
        }
        Ok((loss, gradient))
    }

    /// The gradients of hidden states and table of [`UPSTREAM`] times the loss.
    fn exact_gradients(&self, table: &TokenRows) -> Result<[Exact; 2], Failure> {
        let (_, mut upstream) = self.exact(table)?;
        upstream.values.iter_mut().for_each(|x| *x *= UPSTREAM);
        let [rows, columns] = upstream.shape;
        let upstream = TokenRows::new(upstream.values, rows, columns)?;
        Ok(dense_gradients(&self.hidden, table, &upstream))
    }

    fn loss<H: Harness>(&self, layer: &Layer<H>) -> Result<TokenRows, Failure> {
        let hidden = H::hidden(layer, &self.hidden)?;
        Ok(H::read(&layer.linear_cross_entropy(
            hidden,
            &self.labels,
            self.options,
        )?)?)
    }

    fn pass(&self) -> Pass {
        Pass {
            losses: vec![LossPass {
                hidden: self.hidden.clone(),
                labels: self.labels.clone(),
                options: self.options,
                upstream: UPSTREAM,
            }],
            ..Pass::default()
        }
    }

    /// The gradients of hidden states and of the one active adapter's rows of [`UPSTREAM`] times the loss.
    fn gradients<H: Harness>(&self, layer: &Layer<H>) -> Result<[TokenRows; 2], Failure> {
        let mut result = H::backward(layer, &self.pass())?;
        let rows = layer.gradient(&result.gradients)?;
        let hidden = result.hidden.pop();
        Ok([
            hidden.ok_or("the harness returned no gradient of the hidden states")?,
            rows,
        ])
    }
}

fn scalar(value: f64) -> Exact {
    let (shape, values) = ([1, 1], vec![value]);
    Exact { shape, values }
}

fn chunks(rows: usize) -> Result<CrossEntropyOptions, Failure> {
    Ok(CrossEntropyOptions {
        chunk: LogitsChunk::rows(rows)?,
        ..CrossEntropyOptions::default()
    })
}

/// The loss is that of the logits, by its definition.
pub fn the_loss_is_that_of_the_logits<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        for batch in Batch::of::<H>(world).variants()? {
            let (want, _) = batch.exact(&world.dense::<H>()?)?;
            close("loss", &batch.loss::<H>(&layer)?, &scalar(want), H::DTYPE)?;
        }
        Ok(())
    })
}

/// Hidden states and rows get the gradient of the logits' loss, times the upstream one.
pub fn gradients_are_those_of_the_logits<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        for layer in [world.fresh::<H>()?, world.trained::<H>()?] {
            let table = overwritten(&world.table::<H>(), &world.tokens, &layer.rows()?)?;
            for batch in Batch::of::<H>(world).variants()? {
                let [hidden, rows] = batch.gradients::<H>(&layer)?;
                let [of_hidden, of_table] = batch.exact_gradients(&table)?;
                close("gradient of the hidden states", &hidden, &of_hidden, H::DTYPE)?;
                close("gradient of the rows", &rows, &world.chosen(&of_table), H::DTYPE)?;
            }
        }
        Ok(())
    })
}

/// Chunks of any number of rows give the same.
pub fn chunks_change_rounding_only<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[1, 5, 5, 6, 2, 0, 0, 5]);
    let (layer, table) = (world.trained::<H>()?, world.dense::<H>()?);
    let batch = Batch::of::<H>(&world);
    let [of_hidden, of_table] = batch.exact_gradients(&table)?;
    let n = world.ids.len();
    for rows in [1, 2, 3, n, n + 1] {
        let batch = batch.with(chunks(rows)?);
        let (want, _) = batch.exact(&table)?;
        close("loss", &batch.loss::<H>(&layer)?, &scalar(want), H::DTYPE)?;
        let [hidden, rows] = batch.gradients::<H>(&layer)?;
        close("gradient of the hidden states", &hidden, &of_hidden, H::DTYPE)?;
        close("gradient of the rows", &rows, &world.chosen(&of_table), H::DTYPE)?;
    }
    Ok(())
}

/// Whatever an ignored row holds, nothing changes, and its gradient is zero.
pub fn ignored_rows_do_not_count<H: Harness>() -> Outcome {
    for_all(|world| {
        let (layer, plain) = (world.trained::<H>()?, Batch::of::<H>(world));
        for batch in plain.variants()? {
            let mut values = batch.hidden.to_f64_vec();
            for (row, label) in values.chunks_exact_mut(world.d).zip(&batch.labels) {
                if !batch.counts(*label) {
                    row.fill(f64::NAN);
                }
            }
            let hidden = TokenRows::new(values, world.ids.len(), world.d)?.to_dtype(H::DTYPE);
            let spoiled = Batch {
                hidden,
                ..batch.clone()
            };
            same("loss", &spoiled.loss::<H>(&layer)?, &batch.loss::<H>(&layer)?)?;
            if world.tokens.is_empty() {
                continue;
            }
            let [hidden, rows] = spoiled.gradients::<H>(&layer)?;
            let [want_hidden, want_rows] = batch.gradients::<H>(&layer)?;
            same("gradient of the hidden states", &hidden, &want_hidden)?;
            same("gradient of the rows", &rows, &want_rows)?;
            for (at, label) in batch.labels.iter().enumerate() {
                let row = &hidden.to_f64_vec()[at * world.d..][..world.d];
                ensure!(
                    batch.counts(*label) || row.iter().all(|x| *x == 0.0),
                    "an ignored row has the gradient {row:?}"
                );
            }
        }
        Ok(())
    })
}

/// A new layer's loss is that of the frozen head, bit for bit.
pub fn untrained_rows_are_a_no_op<H: Harness>() -> Outcome {
    for_all(|world| {
        let frozen = Layer::<H>::new(H::source(&world.table::<H>())?, TokenSet::new([], world.v)?)?;
        let layer = world.fresh::<H>()?;
        for batch in Batch::of::<H>(world).variants()? {
            same("loss", &batch.loss::<H>(&layer)?, &batch.loss::<H>(&frozen)?)?;
        }
        Ok(())
    })
}

/// A sum over no label is zero, with zero gradients; a mean over none is refused.
pub fn no_label_has_a_sum_but_no_mean<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[1, 5]);
    let layer = world.trained::<H>()?;
    let mean = Batch {
        labels: vec![-100, 4],
        options: CrossEntropyOptions {
            ignore_index: Some(4),
            ..CrossEntropyOptions::default()
        },
        ..Batch::of::<H>(&world)
    };
    let empty = Batch {
        hidden: TokenRows::zeros(H::DTYPE, 0, 3),
        labels: Vec::new(),
        ..mean.clone()
    };
    for batch in [mean, empty] {
        let hidden = H::hidden(&layer, &batch.hidden)?;
        let result = layer.linear_cross_entropy(hidden, &batch.labels, batch.options);
        let count = batch.labels.len().to_string();
        refused_naming("a mean of nothing", result, ErrorKind::AllIgnored, &[&count])?;
        let sum = batch.with(CrossEntropyOptions {
            reduction: Reduction::Sum,
            ..batch.options
        });
        close("sum", &sum.loss::<H>(&layer)?, &scalar(0.0), H::DTYPE)?;
        let [hidden, rows] = sum.gradients::<H>(&layer)?;
        let zeros = Exact::zeros(batch.labels.len(), 3);
        close("gradient of the hidden states", &hidden, &zeros, H::DTYPE)?;
        close("gradient of the rows", &rows, &Exact::zeros(2, 3), H::DTYPE)?;
    }
    Ok(())
}

/// Labels, hidden states and settings that do not fit are refused, and the culprit is named.
pub fn what_does_not_fit_is_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[1, 5, 6, 0]);
    let (layer, batch) = (world.trained::<H>()?, Batch::of::<H>(&world));
    let refuse = |what: &str, labels: &[i64], columns: usize, kind: ErrorKind, words: &[&str]| -> Outcome {
        let hidden = H::hidden(&layer, &noise(1, H::DTYPE, 4, columns))?;
        let result = layer.linear_cross_entropy(hidden, labels, batch.options);
        refused_naming(what, result, kind, words)
    };
    let range = ErrorKind::TokenOutOfRange;
    refuse(
        "a label past the end",
        &[0, -100, 7, 9],
        3,
        range,
        &["7", "position 2"],
    )?;
    refuse(
        "a negative label",
        &[0, -1, 6, 6],
        3,
        range,
        &["-1", "position 1"],
    )?;
    refuse(
        "a huge label",
        &[0, 0, 0, 1 << 32],
        3,
        range,
        &["4294967296", "position 3"],
    )?;
    refuse(
        "too few labels",
        &[0, 1, 2],
        3,
        ErrorKind::Shape,
        &["[3, 3]", "[4, 3]"],
    )?;
    refuse("wide hidden states", &[0; 4], 4, ErrorKind::Shape, &["[4, 4]"])?;
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused_naming(
            "a softcap",
            Softcap::new(bad),
            ErrorKind::Hyperparameter,
            &["softcap"],
        )?;
    }
    let none = [LogitsChunk::rows(0), LogitsChunk::bytes(0)];
    for none in none {
        refused_naming("an empty chunk", none, ErrorKind::Hyperparameter, &["chunk"])?;
    }
    Ok(())
}

/// Lookup, head and loss of one pass add their gradients up.
pub fn lookup_head_and_loss_add_up<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        let (layer, batch) = (world.trained::<H>()?, Batch::of::<H>(world));
        let rows = |pass: &Pass| -> Result<TokenRows, Failure> {
            Ok(layer.gradient(&H::backward(&layer, pass)?.gradients)?)
        };
        let loss = batch.pass();
        let others = Pass {
            lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
            heads: vec![HeadPass::new(world.hidden::<H>(), world.logits_upstream::<H>())],
            ..Pass::default()
        };
        let all = Pass {
            losses: [loss.losses.clone(), loss.losses.clone()].concat(),
            ..others.clone()
        };
        let (mut want, loss) = (Exact::of(&rows(&others)?), Exact::of(&rows(&loss)?));
        want.values
            .iter_mut()
            .zip(&loss.values)
            .for_each(|(sum, x)| *sum += 2.0 * x);
        close("gradient", &rows(&all)?, &want, H::DTYPE)?;
        equal(
            "gradients of hidden states",
            &H::backward(&layer, &all)?.hidden.len(),
            &3,
        )
    })
}

/// The loss sees the rows in effect: of several adapters, of none while they are disabled, of the table once merged.
pub fn the_loss_sees_the_rows_in_effect<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[1, 5, 5, 6, 2]);
    let (mut layer, batch) = (world.trained::<H>()?, Batch::of::<H>(&world));
    let of_second = noise(3, H::DTYPE.default_row_dtype(), 2, 3);
    layer.add_adapter_with_rows("second", TokenSet::new([2, 0], 7)?, &of_second)?;
    layer.activate_overlapping(&["default", "second"], Overlap::LastWins)?;
    let table = overwritten(&world.dense::<H>()?, &[2, 0], &of_second)?;
    let check = |layer: &Layer<H>, table: &TokenRows| -> Outcome {
        let (want, _) = batch.exact(table)?;
        close("loss", &batch.loss::<H>(layer)?, &scalar(want), H::DTYPE)
    };
    check(&layer, &table)?;
    let mut result = H::backward(&layer, &batch.pass())?;
    let [of_hidden, of_table] = batch.exact_gradients(&table)?;
    let hidden = result.hidden.pop().ok_or("no gradient of the hidden states")?;
    close("gradient of the hidden states", &hidden, &of_hidden, H::DTYPE)?;
    let of = |name| -> Result<TokenRows, Failure> { Ok(layer.adapter(name)?.gradient(&result.gradients)?) };
    close(
        "gradient of the second",
        &of("second")?,
        &of_table.select(&[2, 0]),
        H::DTYPE,
    )?;
    // The first adapter's row of token 2 is shadowed.
    let mut want = of_table.select(&[5, 2]);
    want.row_mut(1).fill(0.0);
    close("gradient of the first", &of("default")?, &want, H::DTYPE)?;

    layer.disable()?;
    check(&layer, &world.table::<H>())?;
    layer.enable();
    layer.merge()?;
    check(&layer, &table)?;
    let result = H::backward(&layer, &batch.pass())?;
    let error = layer.adapter("default")?.gradient(&result.gradients);
    refused_naming("a gradient while merged", error, ErrorKind::NoGradient, &[])
}

/// There are no more logits at once than those of a few chunks, whatever the number of rows.
pub fn the_loss_allocates_a_chunk_of_logits<H: Harness>() -> Outcome {
    const VOCABULARY: usize = 20_000;
    const CHUNK: usize = 2;
    let source = H::source(&noise(3, H::DTYPE, VOCABULARY, 4))?;
    let rows = noise(4, H::DTYPE.default_row_dtype(), 2, 4);
    let layer = Layer::<H>::with_rows(source, TokenSet::new([7, 19_999], VOCABULARY)?, &rows)?;
    let logits = CHUNK * VOCABULARY * 8;
    for n in [32i64, 128] {
        let batch = Batch {
            hidden: noise(5, H::DTYPE, usize::try_from(n)?, 4),
            labels: (0..n).map(|at| at * 150).collect(),
            options: chunks(CHUNK)?,
        };
        let both = || -> Outcome {
            batch.loss::<H>(&layer)?;
            H::backward(&layer, &batch.pass())?;
            Ok(())
        };
        both()?;
        let (result, cost) = allocated(both)?;
        result?;
        ensure!(
            cost.growth <= 6 * logits,
            "the loss of {n} rows holds {} bytes at once, a chunk of f64 logits has {logits}",
            cost.growth
        );
    }
    Ok(())
}
