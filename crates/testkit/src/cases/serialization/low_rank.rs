//! LoRA's weights, merged into copies of checkpoints.

use std::fs;
use std::path::Path;

use tempfile::TempDir;
use trainable_tokens_core::{BackendError, DType, ErrorKind, MergeCheck, Overlap, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, AdapterConfig, Checkpoint, Merge, Overwrite, SafetensorsFile};

use super::{HEAD, MODULE, ROWS_FILE, adapter_of, checkpoint_of, key, safetensors_of};
use crate::failure::{Exact, close, ensure, equal, refused, same};
use crate::world::{for_all, noise, overwritten};
use crate::{Failure, Harness, Outcome};

const Q: &str = "h.0.q_proj";
const TABLE: &str = "model.embed_tokens.weight";

/// Fields that give the weights another meaning.
const UNSUPPORTED: [&str; 16] = [
    r#""use_dora": true"#,
    r#""use_qalora": true"#,
    r#""lora_bias": true"#,
    r#""use_bdlora": {"nblocks": 2}"#,
    r#""arrow_config": {"top_k": 3}"#,
    r#""kasa_config": {"beta": 0.1}"#,
    r#""monteclora_config": {"buffer_size": 150}"#,
    r#""alora_invocation_tokens": [1]"#,
    r#""layer_replication": [[0, 1]]"#,
    r#""megatron_config": {"a": 1}"#,
    r#""target_parameters": ["w"]"#,
    r#""init_lora_weights": "pissa""#,
    r#""init_lora_weights": "olora""#,
    r#""init_lora_weights": "corda""#,
    r#""init_lora_weights": "loftq""#,
    r#""init_lora_weights": "lora_ga""#,
];
/// Fields with values that they cannot have.
const WRONG: [&str; 9] = [
    r#""r": 0"#,
    r#""r": 2.0"#,
    r#""lora_alpha": "8""#,
    r#""use_rslora": 1"#,
    r#""fan_in_fan_out": null"#,
    r#""rank_pattern": {"(": 2}"#,
    r#""alpha_pattern": {"q_proj": null}"#,
    r#""target_modules": ["k_proj"]"#,
    r#""exclude_modules": 1"#,
];

fn named(path: &str, factor: &str) -> String {
    format!("base_model.model.{path}.{factor}")
}

/// An adapter of these fields and tensors.
fn lora(fields: &str, tensors: &[(&str, &TokenRows)]) -> Result<Adapter, Failure> {
    let text = format!(r#"{{"peft_type": "LORA", {fields}}}"#);
    let config = AdapterConfig::from_json(text.as_bytes(), "adapter_config.json")?;
    let file = SafetensorsFile::from_bytes(ROWS_FILE, safetensors_of(tensors)?)?;
    Ok(Adapter::from_parts(config, &file)?)
}

/// Whole numbers, which every type and sum holds exactly.
fn whole_numbers(dtype: DType, rows: usize, columns: usize, values: &[i16]) -> Result<TokenRows, Failure> {
    let values = values.iter().map(|value| f32::from(*value)).collect();
    Ok(TokenRows::new::<f32>(values, rows, columns)?.to_dtype(dtype))
}

fn merge(base: &Path, adapters: &[&Adapter], out: &Path) -> Result<(), Failure> {
    let base = Checkpoint::open(base)?;
    let mut named = adapters.iter().enumerate();
    named
        .try_fold(Merge::new(&base), |merge, (at, adapter)| {
            merge.with(at.to_string(), adapter)
        })?
        .write(out, Overwrite::Replace)?;
    Ok(())
}

/// A checkpoint that can be replaced, and where its merged copy goes.
fn model(
    tensors: &[(&str, &TokenRows)],
) -> Result<(TempDir, std::path::PathBuf, std::path::PathBuf), Failure> {
    let (home, dir) = checkpoint_of(tensors)?;
    fs::write(dir.join("config.json"), "{}")?;
    let out = home.path().join("out");
    Ok((home, dir, out))
}

fn read(dir: &Path, tensor: &str) -> Result<TokenRows, Failure> {
    Ok(Checkpoint::open(dir)?.tensor(tensor)?.to_rows()?)
}

/// A base that lacks the rows of new tokens gets them, and its config and index say so; nothing else changes.
pub fn a_merge_grows_the_vocabulary<H: Harness>() -> Outcome {
    let (table, other) = (noise(1, H::DTYPE, 4, 3), noise(2, H::DTYPE, 2, 2));
    let rows = noise(3, DType::F32, 3, 3);
    let tokens = TokenSet::new([5, 1, 4], 6)?;
    let adapter = Adapter::builder(MODULE, &tokens, rows.clone())
        .tied(HEAD)
        .build()?;
    let (home, dir, out) = model(&[("a", &other), (TABLE, &table), ("x", &other)])?;
    fs::rename(dir.join("model.safetensors"), dir.join("one.safetensors"))?;
    let config = r#""architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true"#;
    let index = format!(
        r#"{{"metadata": {{"total_size": 100}}, "weight_map": {{"a": "one.safetensors", "x": "one.safetensors", "{TABLE}": "one.safetensors"}}}}"#
    );
    fs::write(dir.join("model.safetensors.index.json"), index)?;
    let longer = noise(4, H::DTYPE, 2, 3);
    let want = [&table, &longer].map(TokenRows::to_le_bytes).concat();
    let want = TokenRows::from_le_bytes(H::DTYPE, 6, 3, &want)?;
    let want = overwritten(&want, &[5, 1, 4], &rows.to_dtype(H::DTYPE))?;
    for (fields, says) in [
        (
            r#""vocab_size": 4, "x": 1.50"#,
            "  \"vocab_size\": 6,\n  \"x\": 1.50\n}\n",
        ),
        (
            r#""text_config": {"vocab_size": 4}"#,
            "  \"text_config\": {\n    \"vocab_size\": 6\n  },\n",
        ),
    ] {
        fs::write(dir.join("config.json"), format!("{{{config}, {fields}}}"))?;
        let before = super::tree(&dir)?;
        merge(&dir, &[&adapter], &out)?;
        same("the table", &read(&out, TABLE)?, &want)?;
        for name in ["a", "x"] {
            same(name, &read(&out, name)?, &other)?;
        }
        let written = fs::read_to_string(out.join("config.json"))?;
        ensure!(written.contains(says), "{says} is not in {written}");
        let index = fs::read_to_string(out.join("model.safetensors.index.json"))?;
        let size = format!("\"total_size\": {}\n", 100 + 6 * H::DTYPE.size_in_bytes());
        ensure!(index.contains(&size), "{size} is not in {index}");
        equal("the base", &super::tree(&dir)?, &before)?;
    }
    drop(home);
    Ok(())
}

/// The scaled product of the factors is added to linear weights as they lie, and its transpose to embeddings; rank and
/// alpha are those of the module, and the factors' type is any.
pub fn lora_adds_its_scaled_product<H: Harness>() -> Outcome {
    let (a, b) = ([1, 2, 1, 3, 4, -2], [1, 2, 3, 4]);
    let product = [7, 10, -3, 15, 22, -5];
    let turned = [7, 15, 10, 22, -3, -5];
    let linear = ["lora_A.weight", "lora_B.weight"];
    let embedding = ["lora_embedding_A", "lora_embedding_B"];
    for (fields, times, names, shape, want) in [
        (r#""r": 2, "lora_alpha": 2"#, 1, linear, [2, 3], product),
        (r#""r": 2, "lora_alpha": 2"#, 1, linear, [3, 2], turned),
        (
            r#""r": 2, "lora_alpha": 2, "fan_in_fan_out": true"#,
            1,
            linear,
            [2, 3],
            product,
        ),
        (r#""r": 2, "lora_alpha": 6"#, 3, embedding, [3, 2], turned),
        (
            r#""r": 5, "lora_alpha": 9, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"h\\.\\d.q_proj": 8}"#,
            4,
            linear,
            [2, 3],
            product,
        ),
        (
            r#""r": 9, "lora_alpha": 2, "rank_pattern": {"h.0.q_proj": 2, "q_proj": 7, "proj": 3}"#,
            1,
            linear,
            [2, 3],
            product,
        ),
        (
            r#""r": 1, "lora_alpha": 2, "use_rslora": true, "rank_pattern": {"proj": 1, "^h.*": 2}, "alpha_pattern": {"k": 3}"#,
            0,
            linear,
            [2, 3],
            product,
        ),
    ] {
        for stored in crate::cases::DTYPES {
            let base = whole_numbers(H::DTYPE, shape[0], shape[1], &[1, 2, 3, 4, 5, 6])?;
            let [a_name, b_name] = names.map(|name| named(Q, name));
            let (a, b) = (whole_numbers(stored, 2, 3, &a)?, whole_numbers(stored, 2, 2, &b)?);
            let adapter = lora(fields, &[(&a_name, &a), (&b_name, &b)])?;
            let tensor = format!("{Q}.weight");
            let (_home, dir, out) = model(&[(&tensor, &base), ("x", &base)])?;
            merge(&dir, &[&adapter], &out)?;
            let merged = read(&out, &tensor)?;
            same("another tensor", &read(&out, "x")?, &base)?;
            // Zero times stands for the root of two.
            let scale = if times == 0 { 2f64.sqrt() } else { f64::from(times) };
            let mut exact = Exact::of(&base);
            for (at, delta) in want.iter().enumerate() {
                exact.row_mut(at / shape[1])[at % shape[1]] += scale * f64::from(*delta);
            }
            if times == 0 {
                close(fields, &merged, &exact, H::DTYPE)?;
            } else {
                let sums: Vec<f64> = (0..shape[0]).flat_map(|row| exact.row(row).to_vec()).collect();
                same(
                    fields,
                    &merged,
                    &TokenRows::new(sums, shape[0], shape[1])?.to_dtype(H::DTYPE),
                )?;
            }
        }
    }
    Ok(())
}

/// Sums are rounded adapter by adapter; what is added to an embedding is rounded before, too.
pub fn lora_sums_are_rounded_one_by_one<H: Harness>() -> Outcome {
    // What lies between 1 and the next value of the type, and a little that is lost when half of it is rounded.
    let (unit, little) = match H::DTYPE {
        DType::F64 => return Ok(()),
        DType::F32 => (2f32.powi(-23), 2f32.powi(-40)),
        DType::F16 => (2f32.powi(-10), 2f32.powi(-23)),
        DType::BF16 => (2f32.powi(-7), 2f32.powi(-23)),
    };
    let delta = 0.5 * unit + little;
    let one = TokenRows::new(vec![1f32], 1, 1)?;
    for (names, halves) in [
        (["lora_A.weight", "lora_B.weight"], 1.0 + unit),
        (["lora_embedding_A", "lora_embedding_B"], 1.0),
    ] {
        let [a, b] = names.map(|name| named(Q, name));
        let adapter = |delta: f32| {
            let a_rows = TokenRows::new(vec![delta], 1, 1)?;
            lora(r#""r": 1, "lora_alpha": 1"#, &[(&a, &a_rows), (&b, &one)])
        };
        let tensor = format!("{Q}.weight");
        let (_home, dir, out) = model(&[(&tensor, &one.to_dtype(H::DTYPE))])?;
        if H::DTYPE != DType::F32 {
            merge(&dir, &[&adapter(delta)?], &out)?;
            let want = TokenRows::new(vec![halves], 1, 1)?.to_dtype(H::DTYPE);
            same("a little above half a unit", &read(&out, &tensor)?, &want)?;
        }
        // Two quarters are lost one by one, though not together.
        merge(
            &dir,
            &[&adapter(0.25 * unit)?, &adapter(0.25 * unit + little)?],
            &out,
        )?;
        same("two quarters", &read(&out, &tensor)?, &one.to_dtype(H::DTYPE))?;
    }
    Ok(())
}

/// Rows are replaced whatever LoRA adds to their table, whichever adapter comes first; but one module of an adapter has rows
/// or weights, not both.
pub fn rows_win_over_lora<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let rows = adapter_of::<H>(&layer)?;
        let [a, b] = ["lora_embedding_A", "lora_embedding_B"].map(|name| named(MODULE, name));
        let (a_rows, b_rows) = (noise(1, DType::F32, 2, world.v), noise(2, DType::F32, world.d, 2));
        let weights = lora(r#""r": 2"#, &[(&a, &a_rows), (&b, &b_rows)])?;
        let (_home, dir, out) = model(&[(TABLE, &world.table::<H>())])?;
        merge(&dir, &[&weights], &out)?;
        let added = read(&out, TABLE)?;
        ensure!(!added.bits_eq(&world.table::<H>()), "nothing was added");
        let want = overwritten(&added, &world.tokens, &world.rows::<H>())?;
        for order in [[&weights, &rows], [&rows, &weights]] {
            merge(&dir, &order, &out)?;
            same("rows and weights", &read(&out, TABLE)?, &want)?;
        }
        let wrapped = key(MODULE).replace(".trainable", ".token_adapter.trainable");
        let fields = format!(r#""r": 2, "trainable_token_indices": {:?}"#, world.tokens);
        let both = lora(
            &fields,
            &[(&a, &a_rows), (&b, &b_rows), (&wrapped, &world.rows::<H>())],
        )?;
        refused(
            "both on one module",
            both.lora_deltas(&Checkpoint::open(&dir)?),
            ErrorKind::Unsupported,
        )
    })
}

/// What would give the weights another meaning is refused by name: fields, tensors, shapes, modules that are missing.
pub fn lora_of_other_kinds_is_refused<H: Harness>() -> Outcome {
    let (a, b) = (named(Q, "lora_A.weight"), named(Q, "lora_B.weight"));
    let (a_rows, b_rows) = (noise(1, DType::F32, 2, 3), noise(2, DType::F32, 2, 2));
    let weight = noise(3, H::DTYPE, 2, 3);
    let (tensor, other) = (format!("{Q}.weight"), "h.1.q_proj.weight");
    let (_home, dir, _) = model(&[(&tensor, &weight)])?;
    let base = Checkpoint::open(&dir)?;
    let plain = [(&*a, &a_rows), (&*b, &b_rows)];
    let refuse = |base: &Checkpoint, fields: &str, tensors: &[(&str, &TokenRows)], name: &str, kind| {
        let result = lora(fields, tensors)?.lora_deltas(base);
        let message = result
            .as_ref()
            .map_or_else(ToString::to_string, |_| String::new());
        refused(fields, result, kind)?;
        ensure!(message.contains(name), "{fields}: {name} is not in: {message}");
        Ok(())
    };
    for field in UNSUPPORTED {
        let name = field.split('"').nth(1).unwrap_or_default();
        refuse(
            &base,
            &format!(r#""r": 2, {field}"#),
            &plain,
            name,
            ErrorKind::Unsupported,
        )?;
    }
    for field in WRONG {
        let name = field.split('"').nth(1).unwrap_or_default();
        let fields = if name == "r" {
            field.to_owned()
        } else {
            format!(r#""r": 2, {field}"#)
        };
        refuse(&base, &fields, &plain, name, ErrorKind::File)?;
    }
    for extra in [
        "lora_magnitude_vector",
        "lora_B.bias",
        "lora_A.default.weight",
        "weight",
        "base_layer.bias",
    ] {
        let extra = named(Q, extra);
        let tensors = [plain[0], plain[1], (&*extra, &a_rows)];
        refuse(&base, r#""r": 2"#, &tensors, &extra, ErrorKind::Unsupported)?;
    }
    refuse(&base, r#""r": 3"#, &plain, &a, ErrorKind::Shape)?;
    refuse(&base, r#""r": 2"#, &plain[..1], &b, ErrorKind::File)?;
    refuse(&base, r#""r": 2"#, &[], "lora_A", ErrorKind::File)?;
    let (_home, dir, _) = model(&[(&tensor, &weight), (other, &weight)])?;
    let larger = Checkpoint::open(&dir)?;
    refuse(
        &larger,
        r#""r": 2, "target_modules": ["q_proj"]"#,
        &plain,
        "h.1.q_proj",
        ErrorKind::File,
    )?;
    refuse(
        &larger,
        r#""r": 2, "modules_to_save": ["h.1"]"#,
        &plain,
        other,
        ErrorKind::File,
    )?;
    let untargeted = r#""r": 2, "target_modules": ["q_proj"], "exclude_modules": ["h.1.q_proj"]"#;
    equal(
        "deltas",
        &lora(untargeted, &plain)?.lora_deltas(&larger)?.len(),
        &1,
    )?;
    for (tensors, kind) in [
        (vec![(other, &weight)], ErrorKind::File),
        (vec![(&*tensor, &b_rows)], ErrorKind::Shape),
    ] {
        let (_home, dir, _) = model(&tensors)?;
        refuse(&Checkpoint::open(&dir)?, r#""r": 2"#, &plain, Q, kind)?;
    }
    Ok(())
}

/// A weight that comes with the factors counts instead of the base's.
pub fn a_stored_base_weight_counts<H: Harness>() -> Outcome {
    let [a, b, stored] =
        ["lora_embedding_A", "lora_embedding_B", "base_layer.weight"].map(|name| named(MODULE, name));
    let (a_rows, b_rows) = (
        whole_numbers(DType::F32, 1, 2, &[1, 2])?,
        whole_numbers(DType::F32, 1, 1, &[3])?,
    );
    let weight = whole_numbers(DType::F32, 2, 1, &[10, 20])?;
    let adapter = lora(
        r#""r": 1, "lora_alpha": 1"#,
        &[(&a, &a_rows), (&b, &b_rows), (&stored, &weight)],
    )?;
    let (_home, dir, out) = model(&[(TABLE, &noise(1, H::DTYPE, 2, 1))])?;
    merge(&dir, &[&adapter], &out)?;
    same(
        "the sum",
        &read(&out, TABLE)?,
        &whole_numbers(H::DTYPE, 2, 1, &[13, 26])?,
    )?;
    let (_home, dir, _) = model(&[(TABLE, &noise(1, H::DTYPE, 3, 1))])?;
    refused(
        "another size",
        adapter.lora_deltas(&Checkpoint::open(&dir)?),
        ErrorKind::Shape,
    )
}

/// On request a value that is not finite is refused, unless the base's is not either; the error names the adapter, the
/// tensor and the place, and nothing is written.
pub fn a_checked_merge_names_what_is_not_finite<H: Harness>() -> Outcome {
    let [a, b] = ["lora_A.weight", "lora_B.weight"].map(|name| named(Q, name));
    let tensor = format!("{Q}.weight");
    let base = TokenRows::new(vec![f32::NAN, 1.0, 1.0, 1.0], 2, 2)?.to_dtype(H::DTYPE);
    let (_home, dir, out) = model(&[(&tensor, &base), (TABLE, &base)])?;
    let base = Checkpoint::open(&dir)?;
    let adapter = |value: f32| {
        let (a_rows, b_rows) = (
            TokenRows::new(vec![1.0, value], 1, 2)?,
            TokenRows::new(vec![0f32, 1.0], 2, 1)?,
        );
        lora(r#""r": 1, "lora_alpha": 1"#, &[(&a, &a_rows), (&b, &b_rows)])
    };
    let rows = |value: f32| {
        let rows = TokenRows::new(vec![1.0, value], 1, 2)?;
        let name = key(MODULE).replace(".trainable", ".token_adapter.trainable");
        lora(r#""trainable_token_indices": [1]"#, &[(&name, &rows)])
    };
    let check = |weights: f32, row: f32| {
        let merge = Merge::new(&base)
            .with("one", &adapter(weights)?)?
            .with("two", &rows(row)?)?;
        Ok::<_, Failure>(merge.check(MergeCheck::Finite).write(&out, Overwrite::Refuse))
    };
    let infinity = f32::INFINITY;
    for (weights, row, parts) in [
        (0.0, infinity, ["two", TABLE, "token id 1", "column 1"]),
        (infinity, 0.0, ["one", &tensor, "row 0", "column 1"]),
        (-infinity, infinity, ["two", TABLE, "token id 1", "column 1"]),
    ] {
        let result = check(weights, row)?;
        let message = result
            .as_ref()
            .map_or_else(ToString::to_string, |_| String::new());
        refused("not finite", result, ErrorKind::NonFinite)?;
        for part in parts {
            ensure!(message.contains(part), "{part} is not in: {message}");
        }
        ensure!(!out.exists(), "something was written");
    }
    check(1.0, 1.0)??;
    Ok(())
}

/// Tokens that several adapters train are refused, or count as asked for; a name is given once.
pub fn adapters_with_common_tokens_merge_as_asked<H: Harness>() -> Outcome {
    let base = noise(1, H::DTYPE, 4, 1);
    let (_home, dir, out) = model(&[(TABLE, &base)])?;
    let checkpoint = Checkpoint::open(&dir)?;
    let name = key(MODULE).replace(".trainable", ".token_adapter.trainable");
    let adapter = |ids: &str, values: &[i16]| {
        let rows = whole_numbers(H::DTYPE, values.len(), 1, values)?;
        lora(&format!(r#""trainable_token_indices": {ids}"#), &[(&name, &rows)])
    };
    let (first, second) = (adapter("[3, 1]", &[4, 8])?, adapter("[2, 3]", &[16, 32])?);
    let merge = |overlap: Overlap| {
        let merge = Merge::new(&checkpoint)
            .with("first", &first)?
            .with("second", &second)?;
        merge.overlap(overlap).write(&out, Overwrite::Replace)
    };
    let result = merge(Overlap::Refuse);
    let message = result
        .as_ref()
        .map_or_else(ToString::to_string, |_| String::new());
    refused("a common token", result, ErrorKind::Overlap)?;
    for part in ["token id 3", "first", "second"] {
        ensure!(message.contains(part), "{part} is not in: {message}");
    }
    for (overlap, common) in [
        (Overlap::LastWins, 32),
        (Overlap::WeightedMean(vec![3.0, 1.0]), 11),
    ] {
        let report = merge(overlap)?;
        equal("rows", &report.rows, &3)?;
        let rows = whole_numbers(H::DTYPE, 3, 1, &[8, 16, common])?;
        same(
            "the table",
            &read(&out, TABLE)?,
            &overwritten(&base, &[1, 2, 3], &rows)?,
        )?;
    }
    refused(
        "too many weights",
        merge(Overlap::WeightedMean(vec![1.0; 3])),
        ErrorKind::Shape,
    )?;
    refused(
        "no weight",
        merge(Overlap::WeightedMean(vec![1.0, 0.0])),
        ErrorKind::Hyperparameter,
    )?;
    let twice = Merge::new(&checkpoint)
        .with("first", &first)?
        .with("first", &second);
    equal(
        "a name twice",
        &twice.map(drop).map_err(|error| error.kind()),
        &Err(ErrorKind::Adapter),
    )
}
