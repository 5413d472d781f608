//! Trains the byte-level BPE tokenizer and adds the two new tokens.

use std::{fs, path::Path};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use tokenizers::{
    AddedToken, DecoderWrapper, Tokenizer,
    decoders::sequence::Sequence,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    normalizers::Replace,
    pre_tokenizers::byte_level::ByteLevel,
    processors::template::TemplateProcessing,
};

use crate::{text, world};

/// Size of the vocabulary, the two new tokens included.
pub(crate) const VOCAB: usize = 965;

/// Id of `<s>`, which opens every text.
pub(crate) const BOS: u32 = 0;

/// Id of `</s>`, which ends every text.
pub(crate) const EOS: u32 = 1;

/// Id of `<pad>`.
pub(crate) const PAD: u32 = 2;

/// Special tokens in the order of their ids.
const SPECIAL: [&str; 3] = ["<s>", "</s>", "<pad>"];

/// Lets `?` pass the error of the tokenizers crate on.
fn err(e: tokenizers::Error) -> anyhow::Error {
    anyhow!(e)
}

/// Trains the tokenizer on `corpus` and writes its files under `dir`.
///
/// # Errors
///
/// Fails where a file cannot be read or written.
pub(crate) fn write(corpus: &Path, dir: &Path) -> Result<()> {
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCAB - 2)
        .show_progress(false)
        .special_tokens(SPECIAL.map(|t| AddedToken::from(t, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let bytes = ByteLevel::default().add_prefix_space(false).trim_offsets(false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(Some(
            TemplateProcessing::builder()
                .try_single("<s> $A")
                .map_err(|e| anyhow!(e))?
                .try_pair("<s> $A <s> $B")
                .map_err(|e| anyhow!(e))?
                .special_tokens(vec![("<s>", BOS)])
                .build()?,
        ));
    tokenizer
        .train(&mut trainer, text::lines(corpus)?.iter())
        .map_err(err)?;
    let size = tokenizer.get_vocab_size(true);
    ensure!(size == VOCAB - 2, "the corpus gives a vocabulary of {size} only");

    // A new token takes the place of a word with its space, and gives the space back when decoded.
    let mut decoders = Vec::new();
    for noun in world::new_nouns() {
        tokenizer
            .add_tokens([AddedToken::from(noun.name.clone(), false)
                .lstrip(true)
                .normalized(false)])
            .map_err(err)?;
        let spaced = format!(" {}", noun.name);
        decoders.push(DecoderWrapper::Replace(
            Replace::new(noun.name, spaced).map_err(err)?,
        ));
    }
    decoders.push(DecoderWrapper::ByteLevel(bytes));
    tokenizer.with_decoder(Some(Sequence::new(decoders)));
    tokenizer.save(dir.join("tokenizer.json"), false).map_err(err)?;
    let config = json!({
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": false,
        "eos_token": "</s>",
        "model_max_length": crate::config::CONTEXT,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    fs::write(
        dir.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&config)? + "\n",
    )?;
    Ok(())
}

/// Loads the tokenizer of a model directory.
///
/// # Errors
///
/// Fails where `tokenizer.json` is missing or damaged.
pub(crate) fn load(dir: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(dir.join("tokenizer.json"))
        .map_err(err)
        .context("tokenizer.json")
}

/// Ids of each line, `<s>` first and, where asked, `</s>` last.
///
/// # Errors
///
/// Fails where the tokenizer does.
pub(crate) fn encode(tokenizer: &Tokenizer, lines: &[String], eos: bool) -> Result<Vec<Vec<u32>>> {
    let mut out = Vec::new();
    for line in lines {
        let mut ids = tokenizer
            .encode(line.as_str(), true)
            .map_err(err)?
            .get_ids()
            .to_vec();
        if eos {
            ids.push(EOS);
        }
        out.push(ids);
    }
    Ok(out)
}

/// Text of `ids`, special tokens left out.
///
/// # Errors
///
/// Fails where the tokenizer does.
pub(crate) fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
    tokenizer.decode(ids, true).map_err(err)
}
