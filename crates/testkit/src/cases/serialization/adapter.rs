//! Whole adapters: rows, digest, tied modules.

use trainable_tokens_core::{ErrorKind, TokenRows};
use trainable_tokens_format::digest;

use super::{Files, HEAD, MODULE, adapter_of, framed, key, plain_adapter, round_trip, unframed};
use crate::failure::{Exact, ensure, equal, refused, same};
use crate::world::{World, for_all, lookup, noise, odd_values, select};
use crate::{Failure, Harness, Layer, Outcome};

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
        let module = adapter
            .module(MODULE)
            .ok_or("the file has no rows of the module")?;
        equal("token_indices", &module.token_indices(), &world.tokens.as_slice())?;
        let source = H::source(&world.table::<H>())?;
        let loaded = Layer::<H>::with_rows(source, module.token_set(world.v)?, module.rows())?;
        let want = select(&world.dense::<H>()?, &world.ids)?;
        same("rows", &lookup::<H>(&loaded, &world.ids)?, &want)
    })
}

/// The digest of a table is that of its bytes, whatever holds them; training does not change it.
pub fn the_digest_is_that_of_the_bytes<H: Harness>() -> Outcome {
    for_all(|world| {
        let mut layer = world.trained::<H>()?;
        let before = digest(layer.source())?;
        equal("digest", &before, &digest(&world.table::<H>())?)?;
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

/// Every value survives, NaNs with their payloads too, in every element type.
pub fn odd_values_survive<H: Harness>() -> Outcome {
    for_all(|world| {
        for dtype in crate::cases::DTYPES {
            let rows = odd_values(world.seed, dtype, world.tokens.len(), world.d);
            let files = Files::of(&plain_adapter(&world.tokens, rows.clone())?)?;
            let adapter = files.read()??;
            same("rows", adapter.rows("emb").ok_or("no rows of the module")?, &rows)?;
            equal("the file", &adapter.to_safetensors()?, &files.rows)?;
        }
        let rows = odd_values(world.seed, H::DTYPE, world.tokens.len(), world.d);
        let source = H::source(&world.table::<H>())?;
        let layer = Layer::<H>::with_rows(source, world.token_set()?, &rows)?;
        let adapter = round_trip::<H>(&layer)?;
        same(
            "the layer's rows",
            adapter.rows(MODULE).ok_or("no rows of the module")?,
            &rows,
        )
    })
}

/// Copies for tied modules must equal the rows of the targeted module in every bit.
pub fn copies_of_tied_rows_must_agree<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let files = Files::of(&adapter_of::<H>(&world.trained::<H>()?)?)?;
    let adapter = files.read()??;
    equal("modules", &adapter.modules().len(), &1)?;
    equal(
        "tied paths",
        &adapter.modules()[0].tied_paths(),
        &&[HEAD.to_owned()][..],
    )?;
    let (header, data) = unframed(&files.rows)?;
    for bit in [0, data.len() / 2 - 1, data.len() / 2, data.len() - 1] {
        let mut data = data.to_vec();
        data[bit] ^= 1;
        refused(
            "a copy that differs",
            files.with_rows(framed(header, &data)).read()?,
            ErrorKind::File,
        )?;
    }
    // Zeros of both signs are equal numbers, but not equal rows.
    let zeros = |sign: f64| {
        let dtype = H::DTYPE.default_row_dtype();
        Ok::<_, Failure>(TokenRows::new(vec![sign; 6], 2, 3)?.to_dtype(dtype))
    };
    for (head, agree) in [(zeros(0.0)?, true), (zeros(-0.0)?, false)] {
        let tensors = [(key(HEAD), &head), (key(MODULE), &zeros(0.0)?)];
        let tensors = tensors.each_ref().map(|(name, rows)| (name.as_str(), *rows));
        let result = files.with_rows(super::safetensors_of(&tensors)?).read()?;
        equal("whether zeros agree", &result.is_ok(), &agree)?;
    }
    Ok(())
}
