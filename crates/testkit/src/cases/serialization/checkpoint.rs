//! Base checkpoints, and the adapters that fit them.

use std::fs;
use std::path::Path;

use serde_json::json;
use trainable_tokens_core::{DType, EmbeddingSource, ErrorKind, TokenId, TokenRows};
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint, Error, SafetensorsFile, digest};

use super::{HEAD, MODULE, adapter_of, checkpoint_of, framed, key, safetensors_of, unframed};
use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, noise};
use crate::{Failure, Harness, Outcome};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD_TABLE: &str = "lm_head.weight";
const INDEX: &str = "model.safetensors.index.json";

/// Writes an index that puts tensors into files.
fn write_index(dir: &Path, weight_map: &[(&str, &str)]) -> Outcome {
    let entries = weight_map
        .iter()
        .map(|(tensor, file)| ((*tensor).to_owned(), json!(file)));
    let map: serde_json::Map<_, _> = entries.collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    Ok(fs::write(dir.join(INDEX), index.to_string())?)
}

fn read_table(base: &Checkpoint, name: &str) -> Result<TokenRows, Failure> {
    let table = base.table(name)?;
    let ids: Vec<_> = (0u32..).take(table.vocab_size()).map(TokenId).collect();
    Ok(table.read_rows(&ids)?)
}

/// A checkpoint is `model.safetensors`, or else the shards of an index, which is not trusted.
pub fn a_checkpoint_is_one_file_or_an_index_of_shards<H: Harness>() -> Outcome {
    let [table, head, other] = [1, 2, 3].map(|seed| noise(seed, H::DTYPE, 5, 3));
    let home = tempfile::tempdir()?;
    let dir = home.path();
    refused("an empty directory", Checkpoint::open(dir), ErrorKind::File)?;
    let shards = || -> Outcome {
        let first = safetensors_of(&[(TABLE, &table), ("unnamed", &other)])?;
        fs::write(dir.join("a.safetensors"), first)?;
        fs::write(dir.join("b.safetensors"), safetensors_of(&[(HEAD_TABLE, &head)])?)?;
        write_index(dir, &[(TABLE, "a.safetensors"), (HEAD_TABLE, "b.safetensors")])
    };
    shards()?;
    let base = Checkpoint::open(dir)?;
    equal(
        "names",
        &base.names().collect::<Vec<_>>(),
        &vec![HEAD_TABLE, TABLE],
    )?;
    same("the table", &read_table(&base, TABLE)?, &table)?;
    same("the head", &read_table(&base, HEAD_TABLE)?, &head)?;

    let refuse = |what: &str| refused(what, Checkpoint::open(dir), ErrorKind::File);
    for file in [
        "../a.safetensors",
        "./a.safetensors",
        "/a.safetensors",
        "x/a.safetensors",
        "..",
        ".",
    ] {
        fs::create_dir_all(dir.join("x"))?;
        fs::copy(dir.join("a.safetensors"), dir.join("x/a.safetensors"))?;
        write_index(dir, &[(TABLE, file), (HEAD_TABLE, "b.safetensors")])?;
        refuse(&format!("a shard named {file}"))?;
    }
    write_index(
        dir,
        &[(TABLE, "a.safetensors"), (HEAD_TABLE, "absent.safetensors")],
    )?;
    refuse("a shard that is missing")?;
    write_index(dir, &[(TABLE, "a.safetensors"), (HEAD_TABLE, "a.safetensors")])?;
    refuse("a shard that lacks a tensor")?;
    write_index(dir, &[(TABLE, "b.safetensors"), (HEAD_TABLE, "a.safetensors")])?;
    refuse("shards that are swapped")?;
    shards()?;
    fs::write(
        dir.join("b.safetensors"),
        safetensors_of(&[(HEAD_TABLE, &head), (TABLE, &table)])?,
    )?;
    refuse("a tensor in two shards")?;
    shards()?;
    for text in [
        "",
        "[]",
        "{}",
        r#"{"weight_map": []}"#,
        r#"{"weight_map": {"a": 1}}"#,
    ] {
        fs::write(dir.join(INDEX), text)?;
        refuse(&format!("an index of {text:?}"))?;
    }
    let twice = format!(r#"{{"weight_map": {{"{TABLE}": "a.safetensors", "{TABLE}": "a.safetensors"}}}}"#);
    fs::write(dir.join(INDEX), twice)?;
    refuse("a tensor twice in the index")?;
    shards()?;
    let index = fs::read(dir.join(INDEX))?;
    fs::write(
        dir.join(INDEX),
        [&index[..], &vec![b' '; (16 << 20) - index.len()]].concat(),
    )?;
    Checkpoint::open(dir)?;
    fs::write(
        dir.join(INDEX),
        [&index[..], &vec![b' '; (16 << 20) + 1 - index.len()]].concat(),
    )?;
    refuse("an index of more than 16 MiB")?;

    // The single file counts, whatever the index says.
    fs::write(dir.join("model.safetensors"), safetensors_of(&[(TABLE, &other)])?)?;
    let base = Checkpoint::open(dir)?;
    equal("names", &base.names().collect::<Vec<_>>(), &vec![TABLE])?;
    same("the table", &read_table(&base, TABLE)?, &other)
}

/// Tables have two dimensions, rows that 32 bits can name and a type of rows; adapters of any type fit one whose rows
/// are as long and cover the ids.
pub fn an_adapter_fits_tables_of_its_sizes_in_any_type<H: Harness>() -> Outcome {
    let home = tempfile::tempdir()?;
    let check = |adapter: &Adapter, tensors: &[(&str, &TokenRows)]| {
        fs::write(home.path().join("model.safetensors"), safetensors_of(tensors)?)?;
        Ok::<_, Failure>(adapter.check_against(&Checkpoint::open(home.path())?, BaseCheck::Fits))
    };
    for_all(|world| {
        let adapter = adapter_of::<H>(&world.trained::<H>()?)?;
        let of = |dtype, v, d| noise(world.seed, dtype, v, d);
        let dtype = crate::cases::DTYPES[usize::try_from(world.seed % 4)?];
        check(&adapter, &[(HEAD_TABLE, &of(dtype, world.v, world.d))])??;
        let typed = Adapter::builder(MODULE, &world.token_set()?, world.rows_of(dtype)).build()?;
        check(&typed, &[(TABLE, &of(H::DTYPE, world.v + 1, world.d))])??;
        let (table, longer) = (of(H::DTYPE, world.v, world.d), of(H::DTYPE, world.v, world.d + 1));
        refused(
            "longer rows",
            check(&adapter, &[(TABLE, &longer)])?,
            ErrorKind::Shape,
        )?;
        refused(
            "no table",
            check(&adapter, &[("embed_tokens.weight", &table)])?,
            ErrorKind::File,
        )?;
        // Tables of tied modules are checked too.
        let tied = check(&adapter, &[(TABLE, &table), (HEAD_TABLE, &longer)])?;
        refused("longer rows of the head", tied, ErrorKind::Shape)?;
        if let Some(last) = world.tokens.iter().max() {
            let short = of(H::DTYPE, *last as usize, world.d);
            refused(
                "too few rows",
                check(&adapter, &[(TABLE, &short)])?,
                ErrorKind::TokenOutOfRange,
            )?;
            let tied = check(&adapter, &[(TABLE, &table), (HEAD_TABLE, &short)])?;
            refused("too few rows of the head", tied, ErrorKind::TokenOutOfRange)?;
        }
        Ok(())
    })?;
    let bytes = safetensors_of(&[(TABLE, &noise(1, H::DTYPE, 2, 3))])?;
    let (header, data) = unframed(&bytes)?;
    for (from, to, kind) in [
        ("[2,3]", "[6]".to_owned(), ErrorKind::Shape),
        ("[2,3]", "[1,2,3]".to_owned(), ErrorKind::Shape),
        (
            H::DTYPE.to_string().as_str(),
            format!("I{}", 8 * H::DTYPE.size_in_bytes()),
            ErrorKind::DType,
        ),
    ] {
        let file = SafetensorsFile::from_bytes("base", framed(&header.replace(from, &to), data))?;
        refused(&to, file.table(TABLE), kind)?;
    }
    let empty = |v: u64| {
        let dtype = H::DTYPE;
        let header = format!(r#"{{"{TABLE}":{{"dtype":"{dtype}","shape":[{v},0],"data_offsets":[0,0]}}}}"#);
        SafetensorsFile::from_bytes("base", framed(&header, &[])).map(|file| file.table(TABLE))
    };
    if usize::BITS > 32 {
        let most = empty((1 << 32) - 1)?;
        refused("rows without columns", most, ErrorKind::Shape)?;
        refused(
            "a table beyond 32 bits",
            empty(1 << 32)?,
            ErrorKind::TokenOutOfRange,
        )?;
    }
    Ok(())
}

/// A targeted module that has no table in the checkpoint must have the rows of one that has.
pub fn a_module_without_a_table_must_be_tied_to_one<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let (table, rows) = (world.table::<H>(), world.rows::<H>());
    let (_home, dir) = checkpoint_of(&[(TABLE, &table)])?;
    let base = Checkpoint::open(dir)?;
    let adapter = |head: &TokenRows| {
        let builder = Adapter::builder(MODULE, &world.token_set()?, rows.clone());
        Ok::<_, Failure>(builder.module(HEAD, head.clone()).build()?)
    };
    adapter(&rows)?.check_against(&base, BaseCheck::SameTable)?;
    for other in [
        noise(9, rows.dtype(), 2, 3),
        rows.to_dtype(crate::cases::other_dtype(rows.dtype())),
    ] {
        match adapter(&other)?.check_against(&base, BaseCheck::Fits) {
            Err(Error::TiedCopies { first, second, .. }) => {
                equal("the names", &(first, second), &(key(MODULE), key(HEAD)))?;
            }
            other => {
                return Err(Failure::new(format!(
                    "rows of its own without a table give {other:?}"
                )));
            }
        }
        // With a table of its own, it may have rows of its own.
        let (_home, dir) = checkpoint_of(&[(TABLE, &table), (HEAD_TABLE, &table)])?;
        adapter(&other)?.check_against(&Checkpoint::open(dir)?, BaseCheck::Fits)?;
    }
    Ok(())
}

/// On request, sizes, type and digest of the base must be those that the metadata record, and only where they do.
pub fn the_same_table_is_told_from_another<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let layer = world.trained::<H>()?;
    let adapter = adapter_of::<H>(&layer)?;
    let table = world.table::<H>();
    let check = |adapter: &Adapter, how, tensors: &[(&str, &TokenRows)]| {
        let (_home, dir) = checkpoint_of(tensors)?;
        Ok::<_, Failure>(adapter.check_against(&Checkpoint::open(dir)?, how))
    };
    let mut other = world.clone();
    other.seed += 1;
    let other_type = table.to_dtype(crate::cases::other_dtype(H::DTYPE));
    let longer = noise(1, H::DTYPE, 8, 3);
    for (what, table, kind) in [
        ("other values", other.table::<H>(), ErrorKind::File),
        ("another type", other_type, ErrorKind::DType),
        ("more rows", longer.clone(), ErrorKind::Shape),
    ] {
        check(&adapter, BaseCheck::Fits, &[(TABLE, &table)])??;
        refused(
            what,
            check(&adapter, BaseCheck::SameTable, &[(TABLE, &table)])?,
            kind,
        )?;
        let unrecorded = adapter
            .clone()
            .with_metadata(trainable_tokens_format::AdapterMetadata::none())?;
        check(&unrecorded, BaseCheck::SameTable, &[(TABLE, &table)])??;
    }
    check(&adapter, BaseCheck::SameTable, &[(TABLE, &table)])??;
    // A head of its own has another digest, but the same size and type.
    check(
        &adapter,
        BaseCheck::SameTable,
        &[(TABLE, &table), (HEAD_TABLE, &other.table::<H>())],
    )??;
    let tied = check(
        &adapter,
        BaseCheck::SameTable,
        &[(TABLE, &table), (HEAD_TABLE, &longer)],
    )?;
    refused("more rows of the head", tied, ErrorKind::Shape)?;

    // Of several targeted modules, the digest is that of the first by name, in whatever order they were given.
    let second = noise(3, DType::F32, 7, 4);
    let (rows, set) = (noise(4, DType::F32, 2, 4), world.token_set()?);
    let two = Adapter::builder(MODULE, &set, layer.rows()?).module("a.wte", rows);
    let two = two.base(digest(layer.source())?, H::DTYPE).build()?;
    let swapped = check(
        &two,
        BaseCheck::SameTable,
        &[(TABLE, &table), ("a.wte.weight", &second)],
    )?;
    ensure!(swapped.is_err(), "the digest of another module is accepted");
    let tables = [(TABLE, &table), ("z.wte.weight", &noise(3, H::DTYPE, 7, 4))];
    let two = Adapter::builder("z.wte", &set, noise(4, DType::F32, 2, 4)).module(MODULE, layer.rows()?);
    let two = two.base(digest(layer.source())?, H::DTYPE).build()?;
    check(&two, BaseCheck::SameTable, &tables)?.map_err(Failure::from)
}
