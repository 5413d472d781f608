//! Checkpoints of a base model alone, stored without the prefix of transformers' classes, such as the Hub's `gpt2`: every
//! command does with them what it does with the same model stored with it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value, json};
use support::{
    Case, Tensors, args, checkpoint_tensors, copy_dir, edit_json, edit_tensors, fixture, read_json,
    read_tensors, run,
};
use tempfile::TempDir;

/// The files of an adapter.
const ROWS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// The arguments of a line, with paths in the place of `{}`.
fn line(text: &str, paths: &[&Path]) -> Vec<OsString> {
    let mut paths = paths.iter();
    let mut arg = |word: &str| match word {
        "{}" => paths.next().unwrap().into(),
        word => word.into(),
    };
    text.split(' ').map(&mut arg).collect()
}

/// Runs them.
fn done(text: &str, paths: &[&Path]) -> support::Run {
    run(&line(text, paths)).ok()
}

/// A model twice: as its class stores it, and without the prefix.
struct Pair {
    home: TempDir,
    prefix: &'static str,
    token_ids: String,
}

impl Pair {
    fn of(name: &str, prefix: &'static str) -> Self {
        let pair = Self {
            home: tempfile::tempdir().unwrap(),
            prefix,
            token_ids: Case::open(name).token_ids(),
        };
        copy_dir(&fixture(name).join("base"), &pair.path("prefixed"));
        copy_dir(&fixture(name).join("base"), &pair.path("bare"));
        edit_tensors(&pair.path("bare/model.safetensors"), |tensors| {
            *tensors = pair.stripped(tensors);
            if prefix == "transformer." {
                tensors.extend(masks());
            }
        });
        Case::open(name).write_batches(&pair.path("data.jsonl"));
        let ids: Vec<u32> = serde_json::from_str(&format!("[{}]", pair.token_ids)).unwrap();
        fs::write(
            pair.path("ids.json"),
            json!([[1, ids[0], 12, ids[1]]]).to_string(),
        )
        .unwrap();
        pair
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn stripped(&self, tensors: &Tensors) -> Tensors {
        let strip = |name: &str| name.strip_prefix(self.prefix).unwrap_or(name).to_owned();
        tensors
            .iter()
            .map(|(name, tensor)| (strip(name), tensor.clone()))
            .collect()
    }

    /// Runs a command on each of the models, and gives what it wrote and said.
    fn both(&self, out: &str, command: impl Fn(&Path, &Path) -> Vec<OsString>) -> [(PathBuf, Value); 2] {
        ["prefixed", "bare"].map(|model| {
            let out = self.path(&format!("{model}-{out}"));
            let args = [command(&self.path(model), &out), args!["--json"]].concat();
            let report = run(&args).ok().json();
            (out, report)
        })
    }

    /// The same, for a command that writes an adapter, of which rows and weights must be equal to the byte.
    fn same_adapter(&self, out: &str, command: impl Fn(&Path, &Path) -> Vec<OsString>) -> PathBuf {
        let [(prefixed, _), (bare, _)] = self.both(out, command);
        assert_eq!(
            fs::read(prefixed.join(ROWS)).unwrap(),
            fs::read(bare.join(ROWS)).unwrap(),
            "{out}"
        );
        let config = |dir: &Path| {
            let mut config = read_json(&dir.join(CONFIG));
            config["base_model_name_or_path"] = json!(null);
            config
        };
        assert_eq!(config(&prefixed), config(&bare), "{out}");
        bare
    }

    /// Merged models of both have the same tensors, but for their names and the masks.
    fn same_model(&self, [prefixed, bare]: [&Path; 2]) {
        let mut expected = self.stripped(&checkpoint_tensors(prefixed));
        let stored = checkpoint_tensors(bare);
        let masks = stored.iter().filter(|(name, _)| is_mask(name));
        expected.extend(masks.map(|(name, tensor)| (name.clone(), tensor.clone())));
        assert!(stored == expected, "{:?}, {:?}", stored.keys(), expected.keys());
        let masks = |dir: &Path| {
            let tensors = checkpoint_tensors(dir).into_iter();
            tensors.filter(|(name, _)| is_mask(name)).collect::<Tensors>()
        };
        assert!(masks(bare) == masks(&self.path("bare")));
    }
}

fn masks() -> Tensors {
    let mask: Vec<u8> = (0..64 * 64)
        .flat_map(|at| f32::from(u8::from(at % 64 <= at / 64)).to_le_bytes())
        .collect();
    let of_layer = |layer: usize| {
        [
            (
                format!("h.{layer}.attn.bias"),
                (Dtype::F32, vec![1, 1, 64, 64], mask.clone()),
            ),
            (
                format!("h.{layer}.attn.masked_bias"),
                (Dtype::F32, vec![], (-1e4f32).to_le_bytes().to_vec()),
            ),
        ]
    };
    (0..2).flat_map(of_layer).collect()
}

fn is_mask(name: &str) -> bool {
    name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
}

fn pairs() -> [(&'static str, &'static str); 3] {
    [
        ("gpt2_tied", "transformer."),
        ("llama_tied", "model."),
        ("llama_untied", "model."),
    ]
}

fn train(pair: &Pair, model: &Path, out: &Path, more: &str) -> Vec<OsString> {
    let text = format!(
        "train --model {{}} --data {{}} --out {{}} --token-ids {} --batch-size 2 --steps 3 --lr 0.01{more}",
        pair.token_ids
    );
    line(&text, &[model, &pair.path("data.jsonl"), out])
}

#[test]
fn adapters_are_the_same() {
    for (name, prefix) in pairs() {
        let pair = Pair::of(name, prefix);
        let rows = pair.same_adapter("rows", |model, out| train(&pair, model, out, ""));
        let lora = pair.same_adapter("lora", |model, out| {
            train(&pair, model, out, " --lora-rank 2 --lora-targets all-linear")
        });
        let init = format!(
            "init --model {{}} --out {{}} --token-ids {} --init mean+noise:0.1",
            pair.token_ids
        );
        pair.same_adapter("init", |model, out| line(&init, &[model, out]));
        let embedding = Case::open(name).json["modules"][0]["path"].clone();
        let key = format!(
            "base_model.model.{}.trainable_tokens_delta",
            embedding.as_str().unwrap()
        );
        assert!(read_tensors(&rows.join(ROWS)).contains_key(&key), "{name}");
        let theirs = fixture(name).join("adapter");
        for (at, adapter) in [&rows, &lora, &theirs].into_iter().enumerate() {
            does_the_same(&pair, at, adapter);
        }
        let [a, b] = ["prefixed", "bare"].map(|model| {
            let out = |what: &str| pair.path(&format!("{model}-{what}"));
            let text = "split --model {} --adapter {} --out-model {} --out-adapter {}";
            done(text, &[&pair.path(model), &lora, &out("split"), &out("plain")]);
            [out("split"), out("plain")]
        });
        pair.same_model([&a[0], &b[0]]);
        let weights = |dir: &Path| fs::read(dir.join(ROWS)).unwrap();
        assert_eq!(weights(&a[1]), weights(&b[1]));
    }
}

/// What an adapter does to both models.
fn does_the_same(pair: &Pair, at: usize, adapter: &Path) {
    let (data, ids) = (pair.path("data.jsonl"), pair.path("ids.json"));
    let eval = "eval --model {} --adapter {} --data {}";
    let [(_, a), (_, b)] = pair.both("", |model, _| line(eval, &[model, adapter, &data]));
    assert_eq!(a["loss"], b["loss"]);
    let forward = "forward --model {} --adapter {} --input-ids {} --out {}";
    let logits = format!("logits-{at}");
    let [(a, _), (b, _)] = pair.both(&logits, |model, out| line(forward, &[model, adapter, &ids, out]));
    assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
    let generate = format!(
        "generate --model {{}} --adapter {{}} --prompt-ids 1,{} --max-new-tokens 8",
        pair.token_ids
    );
    let [(_, a), (_, b)] = pair.both("", |model, _| line(&generate, &[model, adapter]));
    assert_eq!(a["token_ids"], b["token_ids"]);
    let verify = "verify --model {} --adapter {}";
    let [(_, a), (_, b)] = pair.both("", |model, _| line(verify, &[model, adapter]));
    assert_eq!((&a, &b["fits"]), (&b, &json!(true)));
    let [(_, a), (_, b)] = pair.both("", |model, _| line("inspect {} --model {}", &[adapter, model]));
    assert_eq!(a, b);
    let merge = "merge --model {} --adapter {} --out {}";
    let merged = format!("merged-{at}");
    let [(a, _), (b, report)] = pair.both(&merged, |model, out| line(merge, &[model, adapter, out]));
    pair.same_model([&a, &b]);
    let mut stored = report["tensors"].as_array().unwrap().iter();
    assert!(
        stored.all(|tensor| !tensor.as_str().unwrap().starts_with(pair.prefix)),
        "{report}"
    );
}

#[test]
fn tuned_models_give_their_adapter_however_either_is_stored() {
    for (name, prefix) in pairs() {
        let pair = Pair::of(name, prefix);
        let adapter = fixture(name).join("adapter");
        let merge = "merge --model {} --adapter {} --out {}";
        let [(tuned, _), (tuned_bare, _)] =
            pair.both("tuned", |model, out| line(merge, &[model, &adapter, out]));
        let (base, base_bare) = (pair.path("prefixed"), pair.path("bare"));
        let mut found = Vec::new();
        for (base, tuned) in [
            (&base, &tuned),
            (&base, &tuned_bare),
            (&base_bare, &tuned),
            (&base_bare, &tuned_bare),
        ] {
            let out = pair.path("extracted");
            done(
                "extract --force --base {} --tuned {} --out {}",
                &[base, tuned, &out],
            );
            found.push(fs::read(out.join(ROWS)).unwrap());
            let diff = done("diff --json {} {}", &[base, tuned]).json();
            let [table] = &diff["tables"].as_array().unwrap()[..] else {
                panic!("{diff}");
            };
            let num_tokens = pair.token_ids.split(',').count();
            assert_eq!(table["changed"], json!(num_tokens), "{diff}");
            assert_eq!(table["rows"].as_array().unwrap().len(), num_tokens, "{diff}");
            let mut others = diff["tensors"].as_array().unwrap().iter();
            assert!(
                others.all(|other| is_mask(other["name"].as_str().unwrap())),
                "{diff}"
            );
        }
        assert!(found.iter().all(|rows| *rows == found[0]), "{name}");
        let [(_, a), (_, b)] = pair.both("", |model, _| line("inspect {}", &[model]));
        for field in [
            "digest",
            "head",
            "vocab_size",
            "tie_word_embeddings",
            "table_bytes",
        ] {
            assert_eq!(a[field], b[field], "{name}");
        }
        assert_eq!(b["head"], json!("lm_head"));
    }
}

#[test]
fn new_tokens_keep_the_names() {
    let pair = Pair::of("llama_untied", "model.");
    let add = "add-tokens --model {} --tokens <new> --init mean --out {}";
    let [(a, left), (b, right)] = pair.both("grown", |model, out| line(add, &[model, out]));
    assert_eq!(
        (&left["vocab_size"], &right["vocab_size"]),
        (&json!(301), &json!(301))
    );
    pair.same_model([&a, &b]);
    assert_eq!(read_json(&b.join("config.json"))["vocab_size"], json!(301));
    let tokenizer = |dir: &Path| fs::read(dir.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&a), tokenizer(&b));
}

/// Transformers would start the head at random.
#[test]
fn without_its_head_an_untied_model_has_rows_but_no_logits() {
    let pair = Pair::of("llama_untied", "model.");
    let model = pair.path("bare");
    edit_tensors(&model.join("model.safetensors"), |tensors| {
        tensors.remove("lm_head.weight").unwrap();
    });
    set_class(&model, "LlamaModel");
    let (data, ids, out) = (pair.path("data.jsonl"), pair.path("ids.json"), pair.path("out"));
    let adapter = fixture("llama_untied").join("adapter");
    let no_head = |args: Vec<OsString>| {
        run(&args).refused(&["config.json", "lm_head.weight", "predicts no tokens"]);
    };
    no_head(train(&pair, &model, &out, ""));
    no_head(line("eval --model {} --data {}", &[&model, &data]));
    let eval = "eval --model {} --adapter {} --data {}";
    no_head(line(eval, &[&model, &adapter, &data]));
    let forward = "forward --model {} --input-ids {} --out {}";
    no_head(line(forward, &[&model, &ids, &out]));
    no_head(line("generate --model {} --prompt-ids 1", &[&model]));
    assert!(!out.exists());

    let shown = done("inspect {}", &[&model]).stdout;
    assert!(shown.contains("; no head\n"), "{shown}");
    let init = format!("init --model {{}} --out {{}} --token-ids {}", pair.token_ids);
    done(&init, &[&model, &pair.path("init")]);
    done("verify --model {} --adapter {}", &[&model, &pair.path("init")]);
    let merged = pair.path("merged");
    done(
        "merge --model {} --adapter {} --out {}",
        &[&model, &adapter, &merged],
    );
    let mut expected = pair.stripped(&checkpoint_tensors(&fixture("llama_untied").join("merged")));
    expected.remove("lm_head.weight").unwrap();
    assert!(checkpoint_tensors(&merged) == expected);
    let extracted = pair.path("extracted");
    done(
        "extract --base {} --tuned {} --out {}",
        &[&model, &merged, &extracted],
    );
    let rows: Vec<String> = read_tensors(&extracted.join(ROWS)).into_keys().collect();
    assert_eq!(
        rows,
        ["base_model.model.model.embed_tokens.trainable_tokens_delta"]
    );
    let grown = pair.path("grown");
    let add = "add-tokens --model {} --tokens <new> --init mean --out {}";
    done(add, &[&model, &grown]);
    let table = &read_tensors(&grown.join("model.safetensors"))["embed_tokens.weight"];
    assert_eq!(table.1[0], 301);
}

fn set_class(model: &Path, class: &str) {
    edit_json(&model.join("config.json"), |config| {
        config["architectures"] = json!([class]);
    });
}

/// Copies an adapter, with the names of its rows and weights, but those of heads, as `rename` makes them.
fn respelled(adapter: &Path, out: &Path, rename: impl Fn(&str) -> String) {
    copy_dir(adapter, out);
    edit_tensors(&out.join(ROWS), |tensors| {
        let old = std::mem::take(tensors).into_iter();
        let old = old.filter(|(name, _)| !name.contains("lm_head") && !name.contains("cls."));
        tensors.extend(old.map(|(name, tensor)| {
            let path = name.strip_prefix("base_model.model.").unwrap();
            (format!("base_model.model.{}", rename(path)), tensor)
        }));
    });
}

/// Made for transformers' `AutoModel`, whose modules have no prefix.
#[test]
fn adapters_without_the_prefix_are_taken_too() {
    for (name, prefix) in pairs() {
        let pair = Pair::of(name, prefix);
        let lora = pair.path("lora");
        run(&train(&pair, &pair.path("prefixed"), &lora, " --lora-rank 2")).ok();
        for (at, long) in [fixture(name).join("adapter"), lora].into_iter().enumerate() {
            let short = pair.path(&format!("short-{at}"));
            respelled(&long, &short, |path| {
                path.strip_prefix(prefix).unwrap().to_owned()
            });
            edit_json(&short.join(CONFIG), |config| {
                if let Some(pattern) = config["target_modules"].as_str() {
                    config["target_modules"] = json!(pattern.strip_prefix(prefix));
                }
            });
            for model in ["prefixed", "bare"].map(|model| pair.path(model)) {
                let eval = |adapter: &Path| {
                    let text = "eval --json --model {} --adapter {} --data {}";
                    done(text, &[&model, adapter, &pair.path("data.jsonl")]).json()["loss"].clone()
                };
                assert_eq!(eval(&long), eval(&short), "{name}");
                done("verify --model {} --adapter {}", &[&model, &short]);
                let merged = [&long, &short].map(|adapter| {
                    let out = pair.path("merged");
                    let text = "merge --force --model {} --adapter {} --out {}";
                    done(text, &[&model, adapter, &out]);
                    checkpoint_tensors(&out)
                });
                assert!(merged[0] == merged[1], "{name}");
                // Both train the same tokens, by whichever name.
                let twice = "merge --model {} --adapter {} {} --out {}";
                let twice = line(twice, &[&model, &long, &short, &pair.path("twice")]);
                run(&twice).refused(&["token id", "both"]);
            }
        }
        // Neither spelling counts if both are used.
        let mixed = pair.path("mixed");
        respelled(&pair.path("short-1"), &mixed, |path| {
            let is_factor = path.contains("lora_");
            format!("{}{path}", if is_factor { prefix } else { "" })
        });
        for model in ["prefixed", "bare"].map(|model| pair.path(model)) {
            let merge = "merge --model {} --adapter {} --out {}";
            let merge = line(merge, &[&model, &mixed, &pair.path("of-mixed")]);
            run(&merge).refused(&["both with", prefix]);
        }
    }
}

#[test]
fn two_tensors_of_one_module_are_refused() {
    let pair = Pair::of("gpt2_tied", "transformer.");
    let model = pair.path("bare");
    edit_tensors(&model.join("model.safetensors"), |tensors| {
        let table = tensors["wte.weight"].clone();
        tensors.insert("transformer.wte.weight".to_owned(), table);
    });
    run(&line("inspect {}", &[&model])).refused(&["transformer.wte.weight", "\"wte.weight\""]);
}

/// Of encoders, both spellings of modules are in use: transformers' `AutoModel` has no prefix, whatever is stored.
#[test]
fn adapters_of_encoders_may_have_the_prefix_or_not() {
    let home = tempfile::tempdir().unwrap();
    let place = |name: &str| home.path().join(name);
    let (prefixed, bare, data) = (fixture("bert_mlm/base"), place("bare"), place("data.jsonl"));
    copy_dir(&prefixed, &bare);
    edit_tensors(&bare.join("model.safetensors"), |tensors| {
        let stored = std::mem::take(tensors).into_iter();
        let strip = |(name, tensor): (String, _)| Some((name.strip_prefix("bert.")?.to_owned(), tensor));
        tensors.extend(stored.filter_map(strip));
    });
    set_class(&bare, "BertModel");
    let lines = r#"{"input_ids":[1,50,3],"definition_ids":[7,9]}
{"input_ids":[50,8],"definition_ids":[11,12]}
"#;
    fs::write(&data, lines).unwrap();
    let mut losses = Vec::new();
    for (at, model) in [&prefixed, &bare].into_iter().enumerate() {
        let [own, other] = ["own", "other"].map(|name| place(&format!("{name}-{at}")));
        let teach = "train --model {} --data {} --out {} --token-ids 50 --objective teach --teach-loss cosine \
                     --steps 3 --lr 0.05 --batch-size 2";
        done(teach, &[model, &data, &own]);
        // As PEFT writes it for the other class.
        respelled(&own, &other, |path| match path.strip_prefix("bert.") {
            Some(bare) => bare.to_owned(),
            None => format!("bert.{path}"),
        });
        for adapter in [&own, &other] {
            let eval = "eval --json --model {} --adapter {} --data {} --objective teach --teach-loss cosine";
            losses.push(done(eval, &[model, adapter, &data]).json()["loss"].clone());
            done("verify --model {} --adapter {}", &[model, adapter]);
            let merged = place("merged");
            done(
                "merge --force --model {} --adapter {} --out {}",
                &[model, adapter, &merged],
            );
            let (before, after) = (checkpoint_tensors(model), checkpoint_tensors(&merged));
            let mut changed = before.iter().filter(|(name, tensor)| after[*name] != **tensor);
            let (name, _) = changed.next().unwrap();
            assert!(name.ends_with("word_embeddings.weight"), "{name}");
            assert_eq!(changed.count(), 0);
        }
        let shown = done("inspect {}", &[model]).stdout;
        let head = ["; head tied to it\n", "; no head\n"][at];
        assert!(shown.contains(head), "{shown}");
    }
    assert!(losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
    // What differs between the two is the head.
    let diff = done("diff --json {} {}", &[&prefixed, &bare]).json();
    assert_eq!(diff["tables"], json!([]));
    let mut others = diff["tensors"].as_array().unwrap().iter();
    assert!(
        others.all(|other| other["name"].as_str().unwrap().starts_with("cls.")),
        "{diff}"
    );
}
