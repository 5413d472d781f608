//! Adapters and training states in files.

use serde_json::json;
use trainable_tokens_core::{Adam, AdamConfig, EmbeddingSource, HostTable, RowOptimizer, TokenRows};
use trainable_tokens_format::{Adapter, Overwrite, TrainingState, digest};

use crate::failure::{Exact, ensure, equal, same};
use crate::world::{World, for_all, lookup, noise, overwritten, select};
use crate::{Failure, Harness, Layer, Outcome};

const MODULE: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

/// Writes the layer's rows as an adapter and reads it back.
fn round_trip<H: Harness>(layer: &Layer<H>) -> Result<Adapter, Failure> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path().join("adapter");
    let adapter = Adapter::builder(MODULE, layer.tokens(), layer.rows()?)
        .tied(HEAD)
        .base(digest(layer.source())?, layer.source().dtype())
        .build()?;
    adapter.write(&dir, Overwrite::Refuse)?;
    Ok(Adapter::read(&dir)?)
}

/// An adapter file gives the rows back, bit for bit, in their own element type.
pub fn an_adapter_gives_the_rows_back<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let adapter = round_trip::<H>(&layer)?;
        for path in [MODULE, HEAD] {
            let rows = adapter.rows(path).ok_or("the file has no rows of the module")?;
            same(path, rows, &layer.rows()?)?;
        }
        Ok(())
    })
}

/// The ids stand in the file in slot order, and the rows read from it belong to them.
pub fn the_file_keeps_the_order_of_slots<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let adapter = round_trip::<H>(&layer)?;
        equal(
            "token_indices",
            &adapter.config().token_indices().to_vec(),
            &world.tokens,
        )?;
        let rows = adapter.rows(MODULE).ok_or("the file has no rows of the module")?;
        let source = H::source(&world.table::<H>())?;
        let loaded = Layer::<H>::with_rows(source, adapter.token_set(world.v)?, rows)?;
        let want = select(
            &overwritten(&world.table::<H>(), &world.tokens, rows)?,
            &world.ids,
        )?;
        same("rows", &lookup::<H>(&loaded, &world.ids)?, &want)
    })
}

/// The digest of a table is that of its bytes, whatever holds them; training does not change it.
pub fn the_digest_is_that_of_the_bytes<H: Harness>() -> Outcome {
    for_all(|world| {
        let mut layer = world.trained::<H>()?;
        let before = digest(layer.source())?;
        equal("digest", &before, &digest(&OnHost(world.table::<H>()))?)?;
        layer.set_rows(&noise(3, layer.rows()?.dtype(), world.tokens.len(), world.d))?;
        equal("digest after training", &digest(layer.source())?, &before)?;
        if !world.tokens.is_empty() {
            layer.merge()?;
            let merged = digest(layer.source())?;
            layer.unmerge()?;
            equal("digest after unmerging", &digest(layer.source())?, &before)?;
            let changed = Exact::of(&layer.rows()?.to_dtype(H::DTYPE)).values
                != Exact::of(&select(&world.table::<H>(), &world.tokens)?).values;
            ensure!(!changed || merged != before, "merging does not change the digest");
        }
        Ok(())
    })
}

/// Rows on the host as a table.
struct OnHost(TokenRows);

impl EmbeddingSource for OnHost {
    type Error = trainable_tokens_core::Error;

    fn vocab_size(&self) -> usize {
        self.0.num_rows()
    }
    fn embedding_dim(&self) -> usize {
        self.0.embedding_dim()
    }
    fn dtype(&self) -> trainable_tokens_core::DType {
        self.0.dtype()
    }
    fn read_rows(&self, ids: &[trainable_tokens_core::TokenId]) -> Result<TokenRows, Self::Error> {
        self.collect_rows(ids)
    }
}

impl HostTable for OnHost {
    fn row(&self, id: trainable_tokens_core::TokenId) -> Option<trainable_tokens_core::RowRef<'_>> {
        self.0.row(id.row())
    }
}

/// An adapter says which table it belongs to, by sizes and digest.
pub fn an_adapter_knows_its_table<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let layer = world.trained::<H>()?;
    let adapter = round_trip::<H>(&layer)?;
    let digest_of = |layer: &Layer<H>| digest(layer.source());
    let stored = adapter.metadata().base_digest;
    equal("the file's digest", &stored, &Some(digest_of(&layer)?))?;
    let mut other = world.clone();
    other.seed += 1;
    let other = other.trained::<H>()?;
    ensure!(
        stored != Some(digest_of(&other)?),
        "another table has the same digest"
    );
    equal("vocab_size", &adapter.metadata().vocab_size, &Some(7))?;
    equal("embedding_dim", &adapter.metadata().embedding_dim, &Some(3))?;
    adapter.check_sizes(7, 3)?;
    ensure!(
        adapter.check_sizes(5, 3).is_err(),
        "a table that lacks a token is accepted"
    );
    ensure!(
        adapter.check_sizes(7, 4).is_err(),
        "a table of another width is accepted"
    );
    Ok(())
}

/// A run that is saved to files and resumed from them ends with the same bits.
pub fn a_saved_run_goes_on_with_the_same_bits<H: Harness>() -> Outcome {
    for_all(|world| {
        let new = || {
            Adam::new(AdamConfig {
                lr: 0.1,
                weight_decay: 0.1,
                amsgrad: true,
                ..AdamConfig::ADAMW
            })
        };
        let gradient = |step| noise(step, H::DTYPE.default_row_dtype(), world.tokens.len(), world.d);
        let (mut layer, mut optimizer) = (world.trained::<H>()?, new()?);
        let mut saved = None;
        for step in 0..5 {
            if step == 2 {
                let dir = tempfile::tempdir()?;
                let extra = json!({"seed": world.seed});
                let state = TrainingState {
                    optimizer: optimizer.state(),
                    extra,
                };
                state.write_into(dir.path())?;
                let state = TrainingState::read(dir.path().join(TrainingState::FILE_NAME))?;
                saved = Some((round_trip::<H>(&layer)?, state));
            }
            layer.step_with(gradient(step), &mut optimizer, &mut [])?;
        }
        let (adapter, state) = saved.ok_or("nothing was saved")?;
        equal("extra", &state.extra, &json!({"seed": world.seed}))?;
        let rows = adapter.rows(MODULE).ok_or("the file has no rows of the module")?;
        let (mut resumed, mut again) = (world.fresh::<H>()?, new()?);
        resumed.set_rows(rows)?;
        again.load_state(state.optimizer)?;
        for step in 2..5 {
            resumed.step_with(gradient(step), &mut again, &mut [])?;
        }
        same("rows", &resumed.rows()?, &layer.rows()?)?;
        equal("state", &again.state(), &optimizer.state())
    })
}
