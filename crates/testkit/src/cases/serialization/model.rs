//! A model's tables: which they are, and how large an adapter needs them.

use std::fs;

use serde_json::json;
use tempfile::TempDir;
use trainable_tokens_core::{DType, EmbeddingSource, ErrorKind, HostTable, TokenId, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterConfig, AdapterMetadata, AdapterSet, BaseCheck, Checkpoint, Error, ModelTables,
    Overwrite, SaveEmbeddingLayers, TargetModules, TokenIndices,
};

use super::{HEAD, MODULE, checkpoint_of, plain_adapter, tree};
use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, lookup, noise, select};
use crate::{Failure, Harness, Layer, Outcome};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD_TABLE: &str = "lm_head.weight";

/// A checkpoint of these tensors with a config of this class; `None` leaves tying to the tensors.
fn model_of(
    class: &str,
    tied: Option<bool>,
    tensors: &[(&str, &TokenRows)],
) -> Result<(TempDir, Checkpoint), Failure> {
    let (home, dir) = checkpoint_of(tensors)?;
    let config = json!({"architectures": [class], "tie_word_embeddings": tied, "vocab_size": 7});
    fs::write(dir.join("config.json"), config.to_string())?;
    Ok((home, Checkpoint::open(dir)?))
}

/// The names and the config of a model tell its input embedding and what is tied to it, for classes of transformers.
pub fn a_models_tables_are_known_by_name<H: Harness>() -> Outcome {
    let table = noise(1, H::DTYPE, 7, 2);
    let of = |class: &str, tied, names: &[&str]| {
        let tensors: Vec<_> = names.iter().map(|name| (*name, &table)).collect();
        let (_home, model) = model_of(class, tied, &tensors)?;
        Ok::<_, Failure>(ModelTables::of(&model)?)
    };
    for (class, tied, names, embedding, others) in [
        (
            "LlamaForCausalLM",
            Some(true),
            &[TABLE][..],
            Some(MODULE),
            &[HEAD][..],
        ),
        ("LlamaForCausalLM", None, &[TABLE], Some(MODULE), &[HEAD]),
        ("LlamaForCausalLM", None, &[TABLE, HEAD_TABLE], Some(MODULE), &[]),
        (
            "LlamaForCausalLM",
            Some(true),
            &[TABLE, HEAD_TABLE],
            Some(MODULE),
            &[HEAD],
        ),
        ("LlamaForCausalLM", Some(false), &[TABLE], Some(MODULE), &[]),
        (
            "LlamaModel",
            Some(true),
            &["embed_tokens.weight"],
            Some("embed_tokens"),
            &[],
        ),
        (
            "T5ForConditionalGeneration",
            Some(true),
            &["shared.weight", "encoder.x.weight", "decoder.x.weight"],
            Some("shared"),
            &["decoder.embed_tokens", "encoder.embed_tokens", HEAD],
        ),
        (
            "BertForMaskedLM",
            Some(true),
            &[
                "bert.embeddings.word_embeddings.weight",
                "cls.predictions.transform.dense.weight",
            ],
            Some("bert.embeddings.word_embeddings"),
            &["cls.predictions.decoder"],
        ),
        (
            "GPT2LMHeadModel",
            Some(true),
            &["transformer.wpe.weight", "transformer.wte.weight"],
            Some("transformer.wte"),
            &[HEAD],
        ),
        ("Other", Some(true), &[TABLE], None, &[]),
    ] {
        let model = of(class, tied, names)?;
        equal(class, &model.input_embedding(), &embedding)?;
        equal(
            class,
            &model.tied(),
            &others
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
                .as_slice(),
        )?;
    }
    Ok(())
}

/// Targets are modules of the model, and tables; those that are tied have the same tokens.
pub fn targets_are_tables_of_the_model<H: Harness>() -> Outcome {
    let (table, square) = (noise(1, H::DTYPE, 7, 2), noise(2, H::DTYPE, 2, 2));
    let tensors = [
        (TABLE, &table),
        ("model.layers.0.q_proj.weight", &square),
        ("out.weight", &square),
    ];
    let (_home, tied) = model_of("LlamaForCausalLM", Some(true), &tensors)?;
    let tied = ModelTables::of(&tied)?;
    let standalone = |target: TargetModules| AdapterConfig::new(&[5, 2], &target);
    let lora = |ids: &[(&str, &[u32])]| {
        let ids = ids.iter().map(|(name, ids)| ((*name).to_owned(), ids.to_vec()));
        AdapterConfig::lora(&TokenIndices::ByModule(ids.collect()))
    };
    let pattern = |text: &str| TargetModules::Pattern(text.to_owned());
    for config in [
        standalone(["embed_tokens"].into())?,
        standalone(["lm_head", "embed_tokens"].into())?,
        standalone(TargetModules::Default)?,
        standalone(pattern(".*embed_tokens"))?,
        lora(&[("embed_tokens", &[5, 2])])?,
        lora(&[("lm_head", &[5, 2]), ("embed_tokens", &[5, 2])])?,
        AdapterConfig::lora(&TokenIndices::List(vec![5, 2]))?,
    ] {
        let targets = tied.targets(&config)?;
        equal("targets", &targets.len(), &1)?;
        equal("the path", &targets[0].path.as_str(), &MODULE)?;
        equal("tied", &targets[0].tied, &vec![HEAD.to_owned()])?;
        equal("the ids", &targets[0].token_indices, &vec![5, 2])?;
    }
    for config in [
        standalone(["wte"].into())?,
        standalone(["tokens"].into())?,
        standalone(pattern("embed_tokens"))?,
        lora(&[("wte", &[5])])?,
    ] {
        ensure!(
            matches!(tied.targets(&config), Err(Error::NoTarget { .. })),
            "{} is a target",
            config.to_json()
        );
    }
    for config in [
        standalone(["q_proj"].into())?,
        standalone(pattern(".*"))?,
        standalone(["out"].into())?,
    ] {
        let result = tied.targets(&config);
        ensure!(
            matches!(result, Err(Error::NotATable { .. })),
            "{result:?} of {}",
            config.to_json()
        );
        refused("no table", result, ErrorKind::Shape)?;
    }
    for config in [
        lora(&[("lm_head", &[5]), ("embed_tokens", &[5, 2])])?,
        lora(&[("lm_head", &[2, 5]), ("embed_tokens", &[5, 2])])?,
        lora(&[("lm_head", &[5])])?,
        standalone(["lm_head"].into())?,
    ] {
        let result = tied.targets(&config);
        ensure!(
            matches!(result, Err(Error::TiedTokens { .. })),
            "{result:?} of {}",
            config.to_json()
        );
        refused("two sets over one table", result, ErrorKind::TokenSet)?;
    }
    // A model that is no checkpoint.
    let named = ModelTables::named(["a.emb", "b.emb"]);
    equal("targets", &named.targets(&standalone(["emb"].into())?)?.len(), &2)?;
    ensure!(
        named.targets(&standalone(TargetModules::Default)?).is_err(),
        "there is no input embedding"
    );
    let named = named.with_input_embedding("b.emb").with_tied(["a.emb"]);
    let target = &named.targets(&standalone(TargetModules::Default)?)?[0];
    equal("the path", &target.path.as_str(), &"b.emb")
}

/// A base of fewer rows is extended by those of the new tokens: trained rows come out at their places, all others as in
/// the base.
pub fn rows_extend_a_smaller_base<H: Harness>() -> Outcome {
    for_all(|world| {
        let (v, d) = (world.v, world.d);
        let base = world.table::<H>();
        let (_home, checkpoint) = model_of("LlamaForCausalLM", Some(true), &[(TABLE, &base)])?;
        // The tokens of the world, and two new ones, the last first.
        let new = [v + 1, v].map(|id| u32::try_from(id).unwrap_or(u32::MAX));
        let ids: Vec<u32> = new.into_iter().chain(world.tokens.iter().copied()).collect();
        let set = TokenSet::new(ids.iter().copied(), v + 2)?;
        let rows = noise(world.seed, H::DTYPE, ids.len(), d);
        let grown = noise(5, H::DTYPE, v + 2, d);
        let layer = Layer::<H>::with_rows(H::source(&grown)?, set.clone(), &rows)?;
        let adapter = Adapter::builder(MODULE, &set, layer.rows()?).tied(HEAD).build()?;
        adapter.check_against(&checkpoint, BaseCheck::SameTable)?;
        let table = adapter.table(HEAD, &checkpoint)?;
        equal("rows", &table.vocab_size(), &(v + 2))?;
        equal("rows of the base", &table.base().vocab_size(), &v)?;
        same("the new rows", table.added(), &select(&rows, &[1, 0])?)?;
        ensure!(
            table.row(TokenId(u32::try_from(v + 2)?)).is_none(),
            "there is a row too many"
        );
        let all: Vec<u32> = (0..u32::try_from(v + 2)?).collect();
        let whole = table.read_rows(&all.iter().copied().map(TokenId).collect::<Vec<_>>())?;
        let loaded = Layer::<H>::with_rows(H::source(&whole)?, set, &rows)?;
        for (slot, id) in ids.iter().enumerate() {
            same(
                "a trained row",
                &lookup::<H>(&loaded, &[*id])?,
                &select(&rows, &[u32::try_from(slot)?])?,
            )?;
        }
        let untouched: Vec<u32> = all.into_iter().filter(|id| !ids.contains(id)).collect();
        same(
            "the base's rows",
            &lookup::<H>(&loaded, &untouched)?,
            &select(&base, &untouched)?,
        )
    })
}

/// Rows that are missing are named, of the embedding and of a head that is too small; and a table grows only where the
/// file or the caller says so.
pub fn missing_rows_are_named<H: Harness>() -> Outcome {
    let base = noise(1, H::DTYPE, 7, 2);
    let of = |ids: &[u32]| {
        let vocab_size = ids.iter().max().map_or(0, |id| *id as usize + 1);
        let set = TokenSet::new(ids.iter().copied(), vocab_size)?;
        let rows = noise(2, H::DTYPE, ids.len(), 2);
        Ok::<_, Failure>(Adapter::builder(MODULE, &set, rows).build()?)
    };
    let (_home, tied) = model_of("LlamaForCausalLM", Some(true), &[(TABLE, &base)])?;
    for (ids, missing) in [
        (&[8, 2][..], "token 7"),
        (&[7, 10], "tokens 8 to 9"),
        (&[9], "tokens 7 to 8"),
    ] {
        let result = of(ids)?.check_against(&tied, BaseCheck::Fits);
        let message = result
            .as_ref()
            .map_or_else(ToString::to_string, |()| String::new());
        refused(missing, result, ErrorKind::TokenOutOfRange)?;
        ensure!(message.contains(missing), "{missing} is not in: {message}");
    }
    let (_home, untied) = model_of(
        "LlamaForCausalLM",
        Some(false),
        &[(TABLE, &base), (HEAD_TABLE, &base)],
    )?;
    let result = of(&[7, 8])?.check_against(&untied, BaseCheck::Fits);
    let message = result
        .as_ref()
        .map_or_else(ToString::to_string, |()| String::new());
    refused("a head too small", result, ErrorKind::Shape)?;
    ensure!(
        message.contains("tokens 7 to 8"),
        "the head's rows are not in: {message}"
    );
    // An id past the end is a new token only where the file or the caller says so, as far as it says.
    let silent = of(&[7, 8])?.with_metadata(AdapterMetadata::none())?;
    refused(
        "an id past the end",
        silent.check_against(&tied, BaseCheck::Fits),
        ErrorKind::TokenOutOfRange,
    )?;
    silent
        .clone()
        .with_vocab_size(9)?
        .check_against(&tied, BaseCheck::SameTable)?;
    let further = silent
        .clone()
        .with_vocab_size(11)?
        .check_against(&tied, BaseCheck::Fits);
    let message = further
        .as_ref()
        .map_or_else(ToString::to_string, |()| String::new());
    refused("rows that are missing", further, ErrorKind::TokenOutOfRange)?;
    ensure!(
        message.contains("tokens 9 to 10"),
        "the missing rows are not in: {message}"
    );
    refused(
        "a vocabulary without a token",
        silent.with_vocab_size(8),
        ErrorKind::File,
    )?;
    // A table of which nothing is known does not grow.
    let (_home, other) = model_of("Other", Some(true), &[(TABLE, &base)])?;
    refused(
        "another table",
        of(&[7])?.check_against(&other, BaseCheck::Fits),
        ErrorKind::TokenOutOfRange,
    )
}

/// A table that the adapter holds is the table, whatever the base has; copies of it must agree.
pub fn a_stored_table_is_the_table<H: Harness>() -> Outcome {
    let (base, stored) = (noise(1, H::DTYPE, 7, 2), noise(2, H::DTYPE, 9, 2));
    let (_home, model) = model_of("LlamaForCausalLM", Some(true), &[(TABLE, &base)])?;
    let (_other, grown) = checkpoint_of(&[(TABLE, &stored)])?;
    let grown = Checkpoint::open(grown)?.table(TABLE)?;
    let set = TokenSet::new([8, 2], 9)?;
    let builder = || Adapter::builder(MODULE, &set, noise(3, DType::F32, 2, 2)).tied(HEAD);
    let lora = AdapterConfig::lora(&TokenIndices::List(vec![8, 2]))?;
    for (builder, inner) in [(builder(), ""), (builder().lora(lora), ".token_adapter")] {
        let adapter = builder.embedding_layer(&grown)?.build()?;
        let files = super::Files::of(&adapter)?;
        let adapter = files.read()??;
        let names: Vec<_> = adapter.extra_tensors().map(str::to_owned).collect();
        let want = [HEAD, MODULE].map(|path| format!("base_model.model.{path}{inner}.base_layer.weight"));
        equal("the names", &names, &want.to_vec())?;
        adapter.check_against(&model, BaseCheck::SameTable)?;
        for path in [MODULE, HEAD] {
            let table = adapter.table(path, &model)?;
            let ids: Vec<_> = (0..9).map(TokenId).collect();
            same("the table", &table.read_rows(&ids)?, &stored)?;
        }
        let (header, data) = super::unframed(&files.rows)?;
        let mut data = data.to_vec();
        for bit in &mut data {
            *bit ^= 1;
        }
        let renamed = header.replace(&want[1], "other");
        files.with_rows(super::framed(&renamed, &data)).read()??;
    }
    let small = Adapter::builder(MODULE, &TokenSet::new([2], 6)?, noise(3, DType::F32, 1, 2));
    let (_other, fewer) = checkpoint_of(&[(TABLE, &noise(2, H::DTYPE, 6, 2))])?;
    let small = small
        .embedding_layer(&Checkpoint::open(fewer)?.table(TABLE)?)?
        .build()?;
    refused(
        "a smaller table",
        small.check_against(&model, BaseCheck::Fits),
        ErrorKind::Shape,
    )?;
    for (choice, named, want) in [
        (SaveEmbeddingLayers::Auto, Some(7), true),
        (SaveEmbeddingLayers::Auto, Some(9), false),
        (SaveEmbeddingLayers::Auto, None, false),
        (SaveEmbeddingLayers::Always, Some(9), true),
        (SaveEmbeddingLayers::Never, Some(7), false),
    ] {
        equal(
            &format!("{choice:?} of {named:?}"),
            &choice.decide(9, named),
            &want,
        )?;
    }
    Ok(())
}

/// A directory holds several adapters by name: `default` at its top, each other in a directory of its own.
pub fn a_directory_holds_several_adapters<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let adapter = |seed| plain_adapter(&world.tokens, noise(seed, H::DTYPE, 2, 3));
    let home = tempfile::tempdir()?;
    let dir = home.path().join("adapters");
    let mut set = AdapterSet::new();
    for (seed, name) in (1..).zip(["default", "first", "ä b"]) {
        set.insert(name, adapter(seed)?)?;
    }
    set.write(&dir, Overwrite::Refuse)?;
    ensure!(
        set.write(&dir, Overwrite::Refuse).is_err(),
        "a directory is replaced"
    );
    fs::create_dir(dir.join("no adapter"))?;
    let read = AdapterSet::read(&dir)?;
    equal(
        "the names",
        &read.names().collect::<Vec<_>>(),
        &vec!["default", "first", "ä b"],
    )?;
    for (seed, name) in (1..).zip(["default", "first", "ä b"]) {
        let rows = read
            .get(name)
            .and_then(|adapter| adapter.rows("emb"))
            .ok_or("no adapter of the name")?;
        same(name, rows, &noise(seed, H::DTYPE, 2, 3))?;
    }
    let again = Adapter::read(dir.join("first"))?;
    equal(
        "one of them",
        &again.to_safetensors()?,
        &adapter(2)?.to_safetensors()?,
    )?;
    // Without one at the top, it is a directory of adapters all the same.
    let mut rest = read;
    ensure!(rest.remove("default").is_some(), "there is no default");
    let others = home.path().join("others");
    rest.write(&others, Overwrite::Refuse)?;
    rest.write(&others, Overwrite::Replace)?;
    equal("files", &tree(&others)?.len(), &4)?;
    for name in ["", ".", "..", "a.b", "a/b", "a\\b", "a\n"] {
        refused(name, rest.insert(name, adapter(1)?), ErrorKind::File)?;
    }
    fs::rename(dir.join("first"), dir.join("default"))?;
    refused("two of one name", AdapterSet::read(&dir), ErrorKind::File)?;
    fs::rename(dir.join("default"), dir.join("v1.0"))?;
    refused("a name with a dot", AdapterSet::read(&dir), ErrorKind::File)?;
    refused(
        "no adapter",
        AdapterSet::read(tempfile::tempdir()?.path()),
        ErrorKind::File,
    )
}
