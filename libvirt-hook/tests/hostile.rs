// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names and XML that anybody may have chosen: what `fuzz/` checks for hours is
//! checked here for moments.

#[path = "../../fuzz/invariants/corpus.rs"]
mod corpus;
#[path = "../../fuzz/invariants/hook_input.rs"]
mod hook_input;
#[path = "../../fuzz/invariants/hosts.rs"]
mod hosts;
#[path = "../../fuzz/invariants/message.rs"]
mod message;

use ept_virt_core::policy::NAMESPACE;
use proptest::collection::vec;
use proptest::prelude::*;

#[test]
fn the_corpus_holds() {
    corpus::replay("hook_input", hook_input::check);
}

fn input(domain: &[u8], operation: &str, xml: &str) -> Vec<u8> {
    [domain, operation.as_bytes(), xml.as_bytes()].join(&0)
}

proptest! {
    #[test]
    fn any_name_is_nudged_in_one_line(
        domain in vec(1..=u8::MAX, 0..600),
        operation in "(started|stopped|release|reconnect|prepare|start|migrate|restore|attach|.{0,4})",
    ) {
        hook_input::check(&input(&domain, &operation, "<domain/>"));
    }

    #[test]
    fn who_requires_nothing_starts(
        required in "(required=\"(yes|no|&#121;es|y|.{0,3})\"|requires=\"yes\"|)",
        mode in "(mode=\"(off|observe|place|plase)\"|)",
        inside in "(<p:tiers slow=\"[0-9]\"/>|<p:dram share=\"[0-9]{1,3}%\"/>|<p:x/>|<|)",
        element in "(p:placement|p:other|q:placement|placement)",
    ) {
        let xml = format!(
            "<domain xmlns:p='{NAMESPACE}'><metadata><{element} {required} {mode}>{inside}</{element}></metadata></domain>"
        );
        hook_input::check(&input(b"vm1", "prepare", &xml));
    }
}
