//! `adapter_model.safetensors`: its frame, its names, its other tensors.

use trainable_tokens_core::{ErrorKind, TokenRows};
use trainable_tokens_format::{Adapter, Error, SafetensorsFile};

use super::{
    Files, HEAD, MODULE, adapter_of, framed, key, plain_adapter, safetensors_of, unframed, unpadded,
};
use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, noise};
use crate::{Failure, Harness, Outcome};

/// The file is a length, a header without spaces and padded to 8 bytes, and the rows, once for each module.
pub fn the_rows_file_has_these_bytes<H: Harness>() -> Outcome {
    for_all(|world| {
        let rows = world.rows::<H>();
        let data = rows.to_le_bytes();
        let adapter = Adapter::builder(MODULE, &world.token_set()?, rows.clone()).tied(HEAD);
        let file = adapter.without_metadata().build()?.to_safetensors()?;
        let tensor = |path: &str, at: usize| {
            let [k, d] = rows.shape();
            let (name, dtype) = (key(path), rows.dtype());
            let (from, to) = (at * data.len(), (at + 1) * data.len());
            format!(r#""{name}":{{"dtype":"{dtype}","shape":[{k},{d}],"data_offsets":[{from},{to}]}}"#)
        };
        let (first, second) = (tensor(HEAD, 0), tensor(MODULE, 1));
        let mut header = format!(r#"{{"__metadata__":{{"format":"pt"}},{first},{second}}}"#);
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        ensure!(
            file == framed(&header, &[data.clone(), data.clone()].concat()),
            "the file is {:?}, expected {header:?} and the rows twice",
            String::from_utf8_lossy(&file)
        );
        // The safetensors library, by which PEFT writes, makes the same of it but for the metadata.
        let (head, embedding) = (key(HEAD), key(MODULE));
        let theirs = safetensors_of(&[(&embedding, &rows), (&head, &rows)])?;
        let (their_header, their_data) = unframed(&theirs)?;
        equal(
            "the library's header",
            &unpadded(their_header).0,
            &format!("{{{first},{second}}}").as_str(),
        )?;
        equal("the library's data", &their_data, &unframed(&file)?.1)
    })
}

/// A file whose frame is damaged is refused: lengths, JSON, repeated keys, gaps, overlaps, sizes, and cuts anywhere.
pub fn broken_frames_are_refused<H: Harness>() -> Outcome {
    let rows = noise(1, H::DTYPE, 2, 3);
    let (size, dtype) = (rows.to_le_bytes().len(), H::DTYPE);
    let open = |bytes: Vec<u8>| SafetensorsFile::from_bytes("damaged.safetensors", bytes);
    let refuse = |what: &str, bytes: Vec<u8>| refused(what, open(bytes), ErrorKind::File);
    let entry = |name: &str, shape: &str, from: usize, to: usize| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let data = [rows.to_le_bytes(), rows.to_le_bytes()].concat();
    let two = |a: (usize, usize), b: (usize, usize)| {
        let (a, b) = (entry("a", "[2,3]", a.0, a.1), entry("b", "[2,3]", b.0, b.1));
        framed(&format!("{{{a},{b}}}"), &data)
    };
    let good = two((0, size), (size, 2 * size));
    open(good.clone())?;
    open(two((size, 2 * size), (0, size)))?;
    for end in 0..good.len() {
        refuse(&format!("a file cut after {end} bytes"), good[..end].to_vec())?;
    }
    refuse("a byte too many", [&good[..], &[0]].concat())?;
    refuse("a gap", two((0, size), (size + 1, 2 * size + 1)))?;
    refuse(
        "a gap at the start",
        framed(&format!("{{{}}}", entry("a", "[2,3]", size, 2 * size)), &data),
    )?;
    refuse("an overlap", two((0, size), (0, size)))?;
    refuse("offsets that go back", two((size, 0), (size, 2 * size)))?;
    refuse("offsets past the end", two((0, size), (2 * size, 3 * size)))?;
    let half = rows.to_le_bytes();
    for (what, header) in [
        ("no JSON", "{".to_owned()),
        ("a list", "[]".to_owned()),
        (
            "a tensor twice",
            format!("{{{0},{0}}}", entry("a", "[2,3]", 0, size)),
        ),
        (
            "metadata twice",
            format!(
                r#"{{"__metadata__":{{}},"__metadata__":{{}},{}}}"#,
                entry("a", "[2,3]", 0, size)
            ),
        ),
        (
            "a key of the metadata twice",
            format!(
                r#"{{"__metadata__":{{"a":"","a":""}},{}}}"#,
                entry("a", "[2,3]", 0, size)
            ),
        ),
        (
            "metadata that are no strings",
            format!(r#"{{"__metadata__":{{"a":1}},{}}}"#, entry("a", "[2,3]", 0, size)),
        ),
        (
            "metadata that are no object",
            format!(r#"{{"__metadata__":[],{}}}"#, entry("a", "[2,3]", 0, size)),
        ),
        ("another size", format!("{{{}}}", entry("a", "[2,2]", 0, size))),
        (
            "a negative size",
            format!("{{{}}}", entry("a", "[-2,-3]", 0, size)),
        ),
        (
            "a size beyond all bounds",
            format!("{{{}}}", entry("a", "[4294967296,4294967296,6]", 0, size)),
        ),
        (
            "an unknown type",
            format!(
                "{{{}}}",
                entry("a", "[2,3]", 0, size).replace(&format!("\"{dtype}\""), "\"F7\"")
            ),
        ),
        ("no offsets", r#"{"a":{"dtype":"F32","shape":[]}}"#.to_owned()),
    ] {
        refuse(what, framed(&header, &half))?;
    }
    let sized = |length: usize| framed(&format!("{}{}", "{}", " ".repeat(length - 2)), &[]);
    open(sized(12 << 20))?;
    refuse("a header of more than 12 MiB", sized((12 << 20) + 1))?;
    refuse(
        "a length beyond all bounds",
        [&u64::MAX.to_le_bytes()[..], &good[8..]].concat(),
    )
}

/// Tensors that are no rows have no effect; they are written again beside the rows, in the order of types and names.
pub fn other_tensors_are_kept_in_order<H: Harness>() -> Outcome {
    /// Every type of a file, widest first, and its bits.
    const TYPES: [(&str, usize); 22] = [
        ("U64", 64),
        ("I64", 64),
        ("F64", 64),
        ("C64", 64),
        ("F32", 32),
        ("U32", 32),
        ("I32", 32),
        ("BF16", 16),
        ("F16", 16),
        ("U16", 16),
        ("I16", 16),
        ("F8_E5M2FNUZ", 8),
        ("F8_E4M3FNUZ", 8),
        ("F8_E8M0", 8),
        ("F8_E4M3", 8),
        ("F8_E5M2", 8),
        ("I8", 8),
        ("U8", 8),
        ("F6_E3M2", 6),
        ("F6_E2M3", 6),
        ("F4", 4),
        ("BOOL", 8),
    ];
    let rows = noise(1, H::DTYPE, 1, 4);
    let mut tensors = vec![(H::DTYPE.to_string(), key("emb"), rows.to_le_bytes())];
    // Names in which bytes and letters have other orders, and one that only looks like rows.
    let names = [
        "é",
        "a",
        "Z",
        "b.trainable_tokens_deltas",
        "line\nbreak \"quoted\"",
    ];
    for (dtype, bits) in TYPES {
        for (fill, name) in (0u8..).zip(names) {
            tensors.push((
                dtype.to_owned(),
                format!("{name} {dtype}"),
                vec![fill; 4 * bits / 8],
            ));
        }
    }
    let file = |tensors: &[(String, String, Vec<u8>)]| {
        let (mut header, mut data) = (r#"{"__metadata__":{"format":"pt"}"#.to_owned(), Vec::new());
        for (dtype, name, bytes) in tensors {
            let (name, from) = (serde_json::to_string(name)?, data.len());
            data.extend_from_slice(bytes);
            let to = data.len();
            header.push_str(&format!(
                r#",{name}:{{"dtype":"{dtype}","shape":[1,4],"data_offsets":[{from},{to}]}}"#
            ));
        }
        header.push('}');
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        Ok::<_, Failure>(framed(&header, &data))
    };
    // The order of the file does not matter on reading.
    let plain = Files::of(&plain_adapter(&[5], rows.clone())?)?;
    let adapter = plain.with_rows(file(&tensors)?).read()??;
    same(
        "the rows",
        adapter.rows("emb").ok_or("no rows of the module")?,
        &rows,
    )?;
    equal("modules", &adapter.modules().len(), &1)?;
    equal(
        "other tensors",
        &adapter.extra_tensors().count(),
        &(tensors.len() - 1),
    )?;
    let rank = |dtype: &str| TYPES.iter().position(|(name, _)| *name == dtype);
    tensors.sort_by(|(a_type, a, _), (b_type, b, _)| {
        (rank(a_type), a.as_bytes()).cmp(&(rank(b_type), b.as_bytes()))
    });
    ensure!(
        adapter.to_safetensors()? == file(&tensors)?,
        "the file written again has another order"
    );
    same(
        "the rows",
        Files::of(&adapter)?.read()??.rows("emb").ok_or("no rows")?,
        &rows,
    )
}

/// A name that is almost one of rows is refused, with the right one; so are rows of another shape or type.
pub fn names_that_are_almost_rows_are_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let files = Files::of(&adapter_of::<H>(&world.trained::<H>()?)?)?;
    let rows = noise(1, H::DTYPE, 2, 3);
    let named = |name: &str, rows: &TokenRows| {
        let rows = safetensors_of(&[(&key(MODULE), rows), (name, rows)])?;
        files.with_rows(rows).read()
    };
    for (name, right) in [
        ("lm_head.trainable_tokens_delta".to_owned(), key(HEAD)),
        (format!("{}.default", key(HEAD)), key(HEAD)),
        (format!("{}.default.x", key(HEAD)), key(HEAD)),
        (key("lm_head.token_adapter"), key(HEAD)),
        (
            "base_model.model.trainable_tokens_delta".to_owned(),
            key("<module>"),
        ),
        (key(""), key("<module>")),
        ("trainable_tokens_delta".to_owned(), key("<module>")),
    ] {
        match named(&name, &rows)? {
            Err(Error::TensorKey { tensor, expected, .. }) => {
                equal("the tensor", &tensor, &name)?;
                equal("the right name", &expected, &right)?;
            }
            other => return Err(Failure::new(format!("{name} gives {other:?}"))),
        }
    }
    for other in [
        "lm_head.trainable_tokens_deltas",
        "x_trainable_tokens_delta.y",
        "trainable_tokens_delta.x",
    ] {
        let adapter = named(other, &rows)??;
        equal(
            "other tensors",
            &adapter.extra_tensors().collect::<Vec<_>>(),
            &vec![other],
        )?;
    }
    refused(
        "a row too few",
        named("x", &noise(1, H::DTYPE, 1, 3))?,
        ErrorKind::Shape,
    )?;
    refused(
        "a row too many",
        named("x", &noise(1, H::DTYPE, 3, 3))?,
        ErrorKind::Shape,
    )?;
    let bytes = safetensors_of(&[(&key(MODULE), &rows)])?;
    let (header, data) = unframed(&bytes)?;
    for (from, to, kind) in [
        ("[2,3]", "[6]".to_owned(), ErrorKind::Shape),
        ("[2,3]", "[2,3,1]".to_owned(), ErrorKind::Shape),
        ("[2,3]", "[3,2]".to_owned(), ErrorKind::Shape),
        (
            H::DTYPE.to_string().as_str(),
            format!("I{}", 8 * H::DTYPE.size_in_bytes()),
            ErrorKind::DType,
        ),
    ] {
        let changed = header.replace(from, &to);
        ensure!(changed != header, "the case is wrong");
        refused(&to, files.with_rows(framed(&changed, data)).read()?, kind)?;
    }
    Ok(())
}
