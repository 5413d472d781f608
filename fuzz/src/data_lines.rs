//! JSON Lines of training data.

use crate::check_message;
use crate::trainer::batch::Batch;
use crate::trainer::example::{Example, IGNORED, Limits, Line};

const VOCAB_SIZE: u32 = 320;
const MAX_POSITIONS: usize = 32;

/// The input is a longest length (none if it is below 2) and a text of lines.
///
/// Examples fit the model, are written and read again to the same, and make a batch.
pub fn data_lines(input: &[u8]) {
    let Some((max_length, rest)) = input.split_first() else {
        return;
    };
    let max_length = Some(usize::from(*max_length)).filter(|length| *length >= 2);
    let limits = Limits::new(VOCAB_SIZE as usize, MAX_POSITIONS, max_length);
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    let mut examples = Vec::new();
    for (number, line) in (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty())
    {
        match example(line, number, limits) {
            Ok(example) => examples.push(example),
            Err(reason) => check_message(&reason),
        }
    }
    for example in &examples {
        check(example, limits);
    }
    check_batch(&examples);
}

fn example(line: &str, number: usize, limits: Limits) -> Result<Example, String> {
    let tokens = |text: String| text.bytes().map(u32::from).collect();
    let (input_ids, labels) = match Line::parse(line, limits)? {
        Line::Ids { input_ids, labels } => (input_ids, labels),
        Line::Text(text) => (tokens(text), None),
        Line::DefinedIds {
            input_ids,
            definition_ids,
        } => {
            assert!(definition_ids.iter().all(|id| *id < VOCAB_SIZE));
            (input_ids, None)
        }
        Line::Defined { sentence, .. } => (tokens(sentence), None),
    };
    Example::new(input_ids, labels, number, limits)
}

fn check(example: &Example, limits: Limits) {
    let Example {
        input_ids,
        labels,
        line,
        ..
    } = example;
    assert!((2..=MAX_POSITIONS).contains(&input_ids.len()));
    assert!(input_ids.iter().all(|id| *id < VOCAB_SIZE));
    let text = match labels {
        None => format!("{{\"input_ids\":{input_ids:?}}}"),
        Some(labels) => {
            assert_eq!(input_ids.len(), labels.len());
            let is_label = |label: &i64| *label == IGNORED || (0..i64::from(VOCAB_SIZE)).contains(label);
            assert!(labels.iter().all(is_label));
            format!("{{\"labels\":{labels:?},\"input_ids\":{input_ids:?}}}")
        }
    };
    assert_eq!(self::example(&text, *line, limits).as_ref(), Ok(example));
}

fn check_batch(examples: &[Example]) {
    let all: Vec<&Example> = examples.iter().collect();
    let labels = examples.iter().map(Example::own_labels);
    let labels: Vec<i64> = labels.flat_map(|labels| labels[1..].to_vec()).collect();
    let targets = labels.into_iter().filter(|label| *label != IGNORED);
    let targets: Vec<u32> = targets.filter_map(|label| u32::try_from(label).ok()).collect();
    match Batch::new(&all, 0) {
        Some(batch) => {
            assert_eq!(batch.targets(), targets);
            assert_eq!(batch.input_ids().len(), batch.num_rows() * batch.length());
            let places = batch.target_positions().iter();
            assert!(
                places
                    .max()
                    .is_some_and(|at| (*at as usize) < batch.input_ids().len())
            );
        }
        None => assert!(targets.is_empty()),
    }
}
