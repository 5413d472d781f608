//! Adapter directories, read into this library's types and written from them.
//!
//! - `adapters rewrite IN OUT` reads every adapter below IN and writes them to OUT: the same bytes.
//! - `adapters make SPEC.json OUT` makes new ones, for a model, from rows; see [`make::Spec`].
//!
//! `cargo run -p trainable-tokens-format --example adapters -- rewrite IN OUT`

mod make;

use std::error::Error;

use trainable_tokens_format::{AdapterSet, Overwrite};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (set, out) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["rewrite", dir, out] => (AdapterSet::read(dir)?, out),
        ["make", spec, out] => (make::adapters(spec)?, out),
        _ => return Err("usage: adapters rewrite IN OUT, or adapters make SPEC.json OUT".into()),
    };
    set.write(out, Overwrite::Refuse)?;
    for (name, adapter) in set.iter() {
        let config = adapter.config();
        println!("{name}: {}", config.peft_type());
        for module in adapter.modules() {
            let copies = module.tied_paths().join(", ");
            println!("  {} {:?} [{copies}]", module.path(), module.token_indices());
        }
    }
    Ok(())
}
