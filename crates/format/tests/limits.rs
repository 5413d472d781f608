//! A hostile header, index or pattern takes less than 200 MB to read or refuse, whatever it says.
#![allow(clippy::unwrap_used)]

use std::fmt::Display;
use std::path::Path;

use trainable_tokens_format::{
    Adapter, AdapterConfig, Checkpoint, ModelTables, SafetensorsFile, TrainingState,
};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// What reading may allocate beside the file itself; the rest is for what the allocator wastes on small pieces.
const LARGEST_GROWTH: usize = 128 << 20;
const CONFIG_BYTES: usize = 4 << 20;
const HEADER_BYTES: usize = 12 << 20;
const INDEX_BYTES: usize = 16 << 20;

/// Items between two texts, as many as `size` bytes hold.
fn filled(size: usize, before: &str, item: impl Fn(usize) -> String, after: &str) -> String {
    let mut text = String::with_capacity(size);
    text.push_str(before);
    for item in (0..).map(item) {
        if text.len() + item.len() + 1 + after.len() > size {
            break;
        }
        text.push_str(&item);
        text.push(',');
    }
    text.pop();
    text + after
}

fn check<T, E: Display>(case: &str, read: impl FnOnce() -> Result<T, E>) {
    let (outcome, cost) = allocated(read).unwrap();
    let outcome = outcome.map_or_else(|error| error.to_string(), |_| "read".to_owned());
    let growth = cost.growth;
    println!("{case:.40}: {growth} bytes, {outcome:.80}");
    assert!(growth < LARGEST_GROWTH, "{case}: {growth} bytes");
}

fn patterns() {
    for part in [
        "a|",
        r"\w",
        r"\w{9}",
        "(?=a)",
        r"\w{30}(?=a)",
        r"\w(?=a)",
        r"(?>\w)",
        r"(?=\w*)",
        r"(a)\1",
        "(?(04294967296)e)",
        "[^.]++",
        "((a{1000}){1000}){1000}",
        "(?:(?:(?=a)a{1000}){1000}){1000}",
        "(?:",
    ] {
        for size in [part.len(), 4096] {
            let pattern = part.repeat(size / part.len());
            let json = serde_json::json!({
                "peft_type": "TRAINABLE_TOKENS", "target_modules": pattern, "token_indices": [],
            });
            let json = json.to_string();
            check(part, || {
                let config = AdapterConfig::from_json(json.as_bytes(), "config")?;
                let path = "a".repeat(1 << 12);
                let header = format!(
                    r#"{{"base_model.model.{path}.trainable_tokens_delta":{{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}}}}"#
                );
                Adapter::from_parts(config, &SafetensorsFile::from_bytes("rows", file(&header))?)
            });
        }
    }
}

fn file(header: &str) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes()].concat()
}

fn headers() {
    let empty = r#"{"dtype":"F32","shape":[0,0],"data_offsets":[0,0]}"#;
    let rows = format!(r#""base_model.model.emb.trainable_tokens_delta":{empty}"#);
    let state =
        r#"{"__metadata__":{"trainable_tokens.training_state":"{\"format_version\":1,\"step\":0,\"extra\":["#;
    let metadata = |key: &str| format!(r#"{{"__metadata__":{{"trainable_tokens.{key}":"["#);
    let tail = format!(r#"]"}},{rows}}}"#);
    let header = |before: &str, item: &dyn Fn(usize) -> String, after: &str| {
        let bytes = file(&filled(HEADER_BYTES, before, item, after));
        let case = format!("header {before:.30} {}", item(7));
        check(&case, || -> Result<(), String> {
            let file = SafetensorsFile::from_bytes("rows", bytes).map_err(|error| error.to_string())?;
            let state = TrainingState::from_file(&file).err();
            let config = br#"{"peft_type":"TRAINABLE_TOKENS","target_modules":["emb"],"token_indices":[]}"#;
            let config = AdapterConfig::from_json(config, "config").map_err(|error| error.to_string())?;
            let adapter = Adapter::from_parts(config, &file).err();
            Err(format!("{state:?}, {adapter:?}"))
        });
    };
    header("{", &|at| format!(r#""{at:x}":{empty}"#), "}");
    header(
        "{",
        &|at| format!(r#""base_model.model.{at:x}.trainable_tokens_delta":{empty}"#),
        "}",
    );
    header("{", &|at| format!(r#""{at:x}":0"#), "}");
    header(
        r#"{"a":{"dtype":"F32","data_offsets":[0,0],"shape":["#,
        &|_| "0".to_owned(),
        "]}}",
    );
    header(r#"{"__metadata__":{"#, &|at| format!(r#""{at:x}":"""#), "}}");
    header(&metadata("token_indices"), &|_| "0".to_owned(), &tail);
    header(&metadata("tokens"), &|_| r#"\"\""#.to_owned(), &tail);
    for item in ["0", r#"{\"\":0}"#] {
        header(state, &|_| item.to_owned(), r#"]}"}}"#);
        let text = filled(1 << 20, state, |_| item.to_owned(), r#"]}"}}"#);
        check("a training state of 1 MiB", || {
            TrainingState::from_file(&SafetensorsFile::from_bytes("state", file(&text))?)
        });
    }
}

fn indexes() {
    let index = |before: &str, item: fn(usize) -> String, after: &str| {
        let text = filled(INDEX_BYTES, before, item, after).into_bytes();
        check(&format!("index {}", item(7)), || {
            Checkpoint::from_parts("base", text, |path| SafetensorsFile::from_bytes(path, file("{}")))
        });
    };
    index(r#"{"weight_map":{"#, |at| format!(r#""{at:x}":"a""#), "}}");
    index(r#"{"weight_map":{"#, |at| format!(r#""{at:x}":"{at:x}""#), "}}");
    index("{", |at| format!(r#""{at:x}":0"#), "}");
}

fn model_configs() {
    let header = file(r#"{"emb.weight":{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}}"#);
    let shard = |path: &Path| SafetensorsFile::from_bytes(path, header.clone());
    let index = br#"{"weight_map":{"emb.weight":"a"}}"#.to_vec();
    let base = Checkpoint::from_parts("base", index, shard).unwrap();
    for (before, item, after) in [
        (r#"{"x":["#, r#"{"":0}"#, "]}"),
        (r#"{"architectures":["#, r#""""#, "]}"),
        (r#"{"text_config":["#, "[]", "]}"),
    ] {
        let text = filled(CONFIG_BYTES, before, |_| item.to_owned(), after).into_bytes();
        check(before, || ModelTables::from_parts(&base, Some(text)));
    }
}

// One test: nothing else may allocate meanwhile.
#[test]
fn a_hostile_file_takes_less_than_200_mb() {
    patterns();
    headers();
    indexes();
    model_configs();
}
