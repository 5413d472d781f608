//! What `conformance_tests!` makes of the list, and what it leaves out.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "broken/faulty.rs"]
#[allow(dead_code)]
mod faulty;

use std::process::Command;

use faulty::Broken;
use half::f16;
use trainable_tokens_testkit::{Group, all_cases, conformance_tests};

conformance_tests! {
    f32: Broken<f32>, without allocation "the framework allocates on threads of its own",
    f16: Broken<f16>,
        without head "the framework has no matrix product of this type",
        without allocation "the framework allocates on threads of its own",
}

#[test]
fn groups_are_left_out_by_name() {
    let program = std::env::current_exe().unwrap();
    let list = Command::new(program).arg("--list").output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let left_out: [(&str, &[Group]); 2] = [
        ("f32", &[Group::Allocation]),
        ("f16", &[Group::Head, Group::Allocation]),
    ];
    for (harness, left_out) in left_out {
        let prefix = format!("conformance::{harness}::");
        let mut have: Vec<&str> = list
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix))
            .collect();
        let cases = all_cases::<Broken>();
        let cases = cases.iter().filter(|case| !left_out.contains(&case.group));
        let mut want: Vec<String> = cases
            .map(|case| format!("{}::{}: test", case.group, case.name))
            .collect();
        have.sort_unstable();
        want.sort_unstable();
        assert_eq!(have, want, "{harness}");
    }
}
