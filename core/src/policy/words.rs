// SPDX-License-Identifier: MIT OR Apache-2.0
//! Misspelt words in messages: what was meant, or what there is.

/// The end of a message about `word`: what was meant, or else what there is.
pub(super) fn suggestion(word: &str, known: &[&str]) -> String {
    match (nearest(word, known), known) {
        (Some(right), _) => format!("; did you mean \"{right}\"?"),
        (None, []) => "; there is none here".into(),
        (None, _) => format!("; known here: {}", known.join(", ")),
    }
}

/// The word of `known` that differs from `word` by a third of its letters at
/// most.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (distance, right) = known.iter().map(|right| (edit_distance(word, right), *right)).min()?;
    (distance <= right.chars().count().div_ceil(3)).then_some(right)
}

/// Letters to insert, delete or replace to make `b` of `a`; case does not count.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    // row[j]: distance of the part of `a` read so far to the first j letters of `b`.
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // No word is so long that more of `a` would matter.
    let a: String = a.chars().take(40).collect();
    for (i, from) in a.to_lowercase().chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
