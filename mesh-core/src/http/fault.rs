//! Which faults a request gets. The caller brings the chance.

use http::HeaderMap;

use crate::model::traffic::{Fault, FaultEffect};

/// Of how many the share of a fault is said.
const WHOLE: u64 = 10_000;

/// What happens to a request with these headers, in the faults' order. `chance`: any numbers, evenly spread, one for each.
pub fn of<'a>(
    faults: &'a [Fault],
    headers: &'a HeaderMap,
    mut chance: impl FnMut() -> u64 + 'a,
) -> impl Iterator<Item = FaultEffect> + 'a {
    let happens =
        move |fault: &&Fault| is_for(fault, headers) && chance() % WHOLE < u64::from(fault.of_ten_thousand);
    faults.iter().filter(happens).map(|fault| fault.effect)
}

/// Whether a request has all the headers. One that stands there twice has each of its values.
fn is_for(fault: &Fault, headers: &HeaderMap) -> bool {
    fault.headers.iter().all(|(name, wanted)| {
        headers.get_all(name).iter().any(|value| value.to_str().is_ok_and(|value| wanted.matches(value)))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::http::TextMatch;

    #[test]
    fn a_fault_happens_to_its_share_of_the_requests_that_it_is_for() {
        let tester = vec![("x-tester".to_owned(), TextMatch::Exact("me".into()))];
        let delay = FaultEffect::Delay(Duration::from_secs(1));
        let faults = [
            Fault { of_ten_thousand: 2_500, headers: vec![], effect: delay },
            Fault { of_ten_thousand: 10_000, headers: tester, effect: FaultEffect::Abort(503) },
        ];
        let happened = |headers: &HeaderMap, chance| of(&faults, headers, move || chance).collect::<Vec<_>>();
        let (nobodys, mine) = (HeaderMap::new(), [("x-tester".parse().unwrap(), "me".parse().unwrap())]);
        let mine: HeaderMap = mine.into_iter().collect();
        assert_eq!(happened(&nobodys, 2_499), [delay]);
        assert_eq!(happened(&nobodys, 2_500), []);
        assert_eq!(happened(&mine, 12_499), [delay, FaultEffect::Abort(503)]);
        assert_eq!(happened(&mine, 9_999), [FaultEffect::Abort(503)]);
    }
}
