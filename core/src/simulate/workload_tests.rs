// SPDX-License-Identifier: MIT OR Apache-2.0

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

const PATTERNS: [Pattern; 9] = [
    Pattern::Uniform,
    Pattern::Zipf { theta: 0.99 },
    Pattern::Static { hot: 0.2, to_hot: 0.9 },
    Pattern::HotBlock { hot: 0.001, to_hot: 0.9 },
    Pattern::LateBlock { hot: 0.001, to_hot: 0.9, after: SECOND },
    Pattern::Phase { hot: 0.2, to_hot: 0.9, period: SECOND },
    Pattern::Scan { hot: 0.2, to_hot: 0.9, period: HOUR },
    Pattern::Diurnal { hot: 0.2, to_hot: 0.9, period: HOUR },
    Pattern::Idle,
];

fn params(pattern: Pattern, pages: u64) -> WorkloadParams {
    WorkloadParams { pattern, pages, huge: false, rate_hz: 2.0, granule_pages: None }
}

fn run(params: WorkloadParams) -> (Workload, Vec<u64>) {
    let mut workload = Workload::new(params, 7, 0);
    let mut accessed = vec![!0; bitmap::words_for(params.pages as usize)];
    workload.run(SECOND, &mut accessed);
    (workload, accessed)
}

#[test]
fn rates_add_up_to_the_mean_that_was_asked_for() {
    let pages = 10_000;
    for pattern in PATTERNS {
        for granule_pages in [1, 16] {
            let params = WorkloadParams { granule_pages: Some(granule_pages), ..params(pattern, pages) };
            let (workload, _) = run(params);
            let total: f64 = workload.means().iter().map(|mean| f64::from(*mean)).sum();
            let mean = total * granule_pages as f64 / pages as f64;
            let expected = match pattern {
                Pattern::Idle => 0.001,
                // Midnight.
                Pattern::Diurnal { .. } => 2.0 * NIGHT,
                Pattern::Scan { .. } => 2.0 + 1.0 / 3600.0,
                _ => 2.0,
            };
            assert!((mean / expected - 1.0).abs() < 0.01 || pattern == Pattern::Idle, "{pattern:?} {mean}");
        }
    }
}

#[test]
fn a_bit_says_whether_the_count_is_above_zero() {
    for pattern in PATTERNS {
        let (workload, accessed) = run(params(pattern, 3000));
        let counts = workload.counts().unwrap();
        assert_eq!(counts.len(), 3000);
        for (page, count) in counts.iter().enumerate() {
            assert_eq!(bitmap::get(&accessed, page), *count > 0, "{pattern:?} {page}");
        }
        assert_eq!(accessed.last().unwrap() & !bitmap::tail_mask(3000), 0);
    }
}

#[test]
fn large_guests_have_bits_as_often_as_counts_would_say() {
    let pages = MOST_COUNTED_PAGES + 100;
    for pattern in PATTERNS {
        let (workload, accessed) = run(params(pattern, pages));
        assert!(workload.counts().is_none() && workload.granule_pages() == 64);
        let chance = |mean: &f32| 1.0 - (-f64::from(*mean)).exp();
        let expected: f64 = workload.means().iter().map(|mean| 64.0 * chance(mean)).sum();
        let found = bitmap::count(&accessed) as f64;
        assert!((found - expected).abs() < 0.01 * expected + 300.0, "{pattern:?}: {found} {expected}");
        assert_eq!(accessed.last().unwrap() & !bitmap::tail_mask(pages as usize), 0);
    }
}

#[test]
fn huge_pages_are_accessed_as_a_whole() {
    let params = WorkloadParams { huge: true, ..params(Pattern::Static { hot: 0.2, to_hot: 1.0 }, 10_300) };
    let (workload, accessed) = run(params);
    assert_eq!(workload.granule_pages(), 512);
    for block in (0..10_300).step_by(512) {
        let range = block..(block + 512).min(10_300);
        assert!(bitmap::all(&accessed, range.clone()) || !bitmap::any(&accessed, range));
    }
    // Four of the twenty-one.
    assert_eq!(bitmap::count(&accessed) / 512, 4);
}

#[test]
fn phases_have_other_hot_pages() {
    let pattern = Pattern::Phase { hot: 0.2, to_hot: 1.0, period: SECOND };
    let (mut workload, mut accessed) = run(WorkloadParams { rate_hz: 10.0, ..params(pattern, 1000) });
    let before = accessed.clone();
    workload.run(SECOND, &mut accessed);
    assert!(before.iter().zip(&accessed).all(|(before, after)| before & after == 0));
    assert!(bitmap::count(&before) == 200 && bitmap::count(&accessed) == 200);
}

#[test]
fn a_scan_comes_by_every_page_once_a_period() {
    let pattern = Pattern::Scan { hot: 0.2, to_hot: 1.0, period: 10 * SECOND };
    let (mut workload, mut accessed) = run(WorkloadParams { rate_hz: 0.0, ..params(pattern, 1003) });
    let mut seen: Vec<u32> = workload.counts().unwrap().to_vec();
    for _ in 1..15 {
        workload.run(SECOND, &mut accessed);
        seen.iter_mut().zip(workload.counts().unwrap()).for_each(|(seen, count)| *seen += count);
    }
    let twice = seen.iter().filter(|count| **count == 2).count();
    assert!(seen.iter().all(|count| (1..=2).contains(count)) && (500..=503).contains(&twice), "{twice}");
}

#[test]
fn a_hot_block_is_one_piece() {
    let pattern = Pattern::HotBlock { hot: 0.01, to_hot: 1.0 };
    let (workload, _) = run(WorkloadParams { rate_hz: 1.0, ..params(pattern, 10_000) });
    let means = workload.means();
    let edges = (0..means.len()).filter(|page| means[*page] != means[(page + 1) % means.len()]).count();
    assert_eq!((edges, means.iter().filter(|mean| **mean > 0.0).count()), (2, 100));
}

#[test]
fn a_late_block_is_as_all_else_before() {
    let pattern = Pattern::LateBlock { hot: 0.01, to_hot: 1.0, after: SECOND };
    let (mut workload, mut accessed) = run(params(pattern, 10_000));
    assert!(workload.means().iter().all(|mean| *mean == 2.0));
    workload.run(SECOND, &mut accessed);
    let hot: Vec<usize> = (0..10_000).filter(|page| workload.means()[*page] > 0.0).collect();
    assert!(hot.len() == 100 && hot[99] == hot[0] + 99 && workload.means()[hot[0]] == 200.0);
}
