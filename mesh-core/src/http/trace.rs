//! Which trace a request is of: read from its headers, and written for whoever is asked next.
//!
//! Three forms are known: `traceparent` (W3C Trace Context, level 1, sections 3 and 4), `b3` and `x-b3-…` (B3, of Zipkin). A
//! request goes on in the form that it came in. The caller brings the chance.

use std::{
    fmt,
    num::{NonZeroU64, NonZeroU128},
    str::FromStr,
};

use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The flag of a trace that is recorded.
const SAMPLED: u8 = 1;
/// The flags that we pass on: that one, and that the trace's name is random (level 2, section 2.2.3). All others have to be 0.
const KNOWN_FLAGS: u8 = 3;

/// The name of a trace, 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(NonZeroU128);

/// The name of a span within its trace, 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId(NonZeroU64);

impl TraceId {
    /// A name of a new trace, by chance.
    pub fn random(chance: u128) -> Self {
        // Zero is no name.
        Self(NonZeroU128::new(chance).unwrap_or(NonZeroU128::MIN))
    }

    fn parse(text: &str, digits: usize) -> Option<Self> {
        hex(text, digits).and_then(NonZeroU128::new).map(Self)
    }

    /// As spans are exported.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.get().to_be_bytes()
    }
}

impl SpanId {
    /// A name of a new span, by chance.
    pub fn random(chance: u64) -> Self {
        Self(NonZeroU64::new(chance).unwrap_or(NonZeroU64::MIN))
    }

    fn parse(text: &str) -> Option<Self> {
        hex(text, 16).and_then(|number| NonZeroU64::new(u64::try_from(number).ok()?)).map(Self)
    }

    /// As spans are exported.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.get().to_be_bytes()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A number of so many digits, in lower case, as all forms want it.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == digits && text.bytes().all(is_hex)).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// Which part of all is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u128);

/// A text is not a share.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a share: write a percentage from 0% to 100%, as in 5% or 0.1%")]
pub struct ShareError(String);

impl Share {
    /// Everything.
    pub const ALL: Self = Self(1 << 64);

    /// Whether it is empty.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether it has what chance says so of; any numbers, evenly spread.
    pub fn takes(self, chance: u64) -> bool {
        u128::from(chance) < self.0
    }

    /// The same for all who decide on a trace: its name is the chance.
    fn takes_trace(self, trace: TraceId) -> bool {
        let [.., a, b, c, d, e, f, g, h] = trace.to_bytes();
        self.takes(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

impl FromStr for Share {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let number = text.strip_suffix('%').filter(|it| it.starts_with(|c: char| c.is_ascii_digit()));
        let percent = number.and_then(|number| number.parse::<f64>().ok());
        let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
        let percent = percent.ok_or_else(|| ShareError(text.to_owned()))?;
        Ok(Self((percent / 100.0 * Self::ALL.0 as f64) as u128))
    }
}

/// The forms that a context is told in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Forms {
    w3c: bool,
    b3: bool,
    /// B3 in a header for each part.
    b3_parts: bool,
}

/// What the headers of a request say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Said {
    /// The trace that it is of, and the span that it comes from.
    context: Option<(TraceId, SpanId)>,
    /// Whether it is recorded; `None`: whoever comes next may decide.
    sampled: Option<bool>,
    forms: Forms,
    /// The trace's name has 8 bytes, as in B3 it may.
    is_short: bool,
    /// The rest of the flags.
    flags: u8,
    /// It is recorded whatever anybody says.
    debug: bool,
}

impl Said {
    /// The trace that a request is of.
    pub fn trace(&self) -> Option<TraceId> {
        self.context.map(|(trace, _)| trace)
    }
}

/// Reads what is said. What cannot be read is as if it were not there; of forms that do not agree W3C's holds, and the other
/// ones are left alone.
pub fn read(headers: &HeaderMap) -> Said {
    let all = [traceparent(headers), b3(headers), b3_parts(headers)];
    let mut found = all.into_iter().flatten();
    let Some(mut said) = found.next() else { return Said::default() };
    let trace = said.trace();
    for other in found.filter(|other| other.trace() == trace) {
        said.forms.b3 |= other.forms.b3;
        said.forms.b3_parts |= other.forms.b3_parts;
        said.is_short |= other.is_short;
        said.debug |= other.debug;
    }
    said
}

/// The value of a header that stands there once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// W3C Trace Context, section 3.2: a version that is not known yet begins as the known one does.
fn traceparent(headers: &HeaderMap) -> Option<Said> {
    let text = only(headers, &TRACEPARENT)?;
    let (head, rest) = (text.get(..55)?, text.get(55..)?);
    let mut parts = head.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let known = match hex(version, 2)? {
        0xff => false,
        0 => rest.is_empty(),
        _ => rest.is_empty() || rest.starts_with('-'),
    };
    let context = Some((TraceId::parse(trace, 32)?, SpanId::parse(span)?));
    let flags = u8::try_from(hex(flags, 2)?).ok()?;
    let forms = Forms { w3c: true, ..Forms::default() };
    let (sampled, flags) = (Some(flags & SAMPLED != 0), flags & KNOWN_FLAGS);
    (known && parts.next().is_none()).then_some(Said { context, sampled, forms, flags, ..Said::default() })
}

/// B3 in one header: `TRACE-SPAN`, then perhaps `-STATE`, then perhaps `-PARENT`; or the state alone.
fn b3(headers: &HeaderMap) -> Option<Said> {
    let text = only(headers, &B3)?;
    let forms = Forms { b3: true, ..Forms::default() };
    let parts: Vec<&str> = text.splitn(5, '-').collect();
    let (trace, span, state) = match parts[..] {
        [state] => {
            let (sampled, debug) = b3_state(state)?;
            return Some(Said { sampled: Some(sampled), debug, forms, ..Said::default() });
        }
        [trace, span] => (trace, span, None),
        [trace, span, state] | [trace, span, state, _] => (trace, span, Some(b3_state(state)?)),
        _ => return None,
    };
    let (context, is_short) = b3_context(trace, span)?;
    let (sampled, debug) = (state.map(|it| it.0), state.is_some_and(|it| it.1));
    Some(Said { context: Some(context), sampled, forms, is_short, debug, flags: 0 })
}

/// B3 in a header for each part.
fn b3_parts(headers: &HeaderMap) -> Option<Said> {
    let debug = only(headers, &B3_FLAGS) == Some("1");
    let state = only(headers, &B3_SAMPLED).map(b3_state);
    let sampled = match state {
        _ if debug => Some(true),
        Some(state) => Some(state?.0),
        None => None,
    };
    let forms = Forms { b3_parts: true, ..Forms::default() };
    let said = Said { sampled, forms, debug, ..Said::default() };
    match (only(headers, &B3_TRACE), only(headers, &B3_SPAN)) {
        (Some(trace), Some(span)) => {
            let (context, is_short) = b3_context(trace, span)?;
            Some(Said { context: Some(context), is_short, ..said })
        }
        (None, None) => sampled.map(|_| said),
        _ => None,
    }
}

/// The context, and whether the trace's name is a short one.
fn b3_context(trace: &str, span: &str) -> Option<((TraceId, SpanId), bool)> {
    let is_short = trace.len() == 16;
    Some(((TraceId::parse(trace, if is_short { 16 } else { 32 })?, SpanId::parse(span)?), is_short))
}

/// Whether it is recorded, and whether whatever anybody says. The words are those of old clients.
fn b3_state(text: &str) -> Option<(bool, bool)> {
    match text {
        "1" | "true" => Some((true, false)),
        "0" | "false" => Some((false, false)),
        "d" => Some((true, true)),
        _ => None,
    }
}

/// Where a request stands in its trace, from us on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The trace.
    pub trace: TraceId,
    /// Our span, which whoever is asked next takes for its parent.
    pub span: SpanId,
    /// The span that it comes from; `None`: the trace begins here.
    pub parent: Option<SpanId>,
    /// Whether it is recorded. One that is not is told, so that all who come next decide alike.
    pub sampled: bool,
    /// The flags of a W3C context, as they are exported.
    pub flags: u8,
    forms: Forms,
    is_short: bool,
    debug: bool,
}

/// Where a request stands of which this was said, when so many of those of which nothing was are recorded. `None`: its headers
/// go on as they are, and there is nothing to record. `chance`: any numbers, evenly spread.
pub fn place(said: &Said, share: Share, chance: impl FnOnce() -> (u128, u64)) -> Option<Place> {
    if said.sampled == Some(false) || (said.sampled.is_none() && share.is_none()) {
        return None;
    }
    let (trace, span) = chance();
    let (trace, span) = (said.trace().unwrap_or_else(|| TraceId::random(trace)), SpanId::random(span));
    let sampled = said.sampled.unwrap_or_else(|| share.takes_trace(trace));
    // Of a trace of others that is left to us, and that we do not take, others may think otherwise.
    if !sampled && said.context.is_some() {
        return None;
    }
    let forms = if said.forms == Forms::default() { Forms { w3c: true, ..said.forms } } else { said.forms };
    let flags = said.flags & !SAMPLED | if sampled { SAMPLED } else { 0 };
    let parent = said.context.map(|(_, span)| span);
    let (is_short, debug) = (said.is_short, said.debug);
    Some(Place { trace, span, parent, sampled, flags, forms, is_short, debug })
}

impl Place {
    /// Tells whoever is asked next. What comes with a context (`tracestate`) goes on with it, and not with a new one (W3C Trace
    /// Context, section 4.3).
    pub fn write(&self, headers: &mut HeaderMap) {
        let Self { trace, span, parent, forms, .. } = self;
        let mut set = |name: HeaderName, value: String| {
            // Digits and dashes.
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        };
        let b3_trace = trace.to_string().split_off(if self.is_short { 16 } else { 0 });
        if forms.w3c {
            set(TRACEPARENT, format!("00-{trace}-{span}-{:02x}", self.flags));
        }
        if forms.b3 {
            let state = if self.debug { "d" } else { "1" };
            let parent = parent.map(|parent| format!("-{parent}")).unwrap_or_default();
            set(B3, format!("{b3_trace}-{span}-{state}{parent}"));
        }
        if forms.b3_parts {
            set(B3_TRACE, b3_trace);
            set(B3_SPAN, span.to_string());
            if let Some(parent) = parent {
                set(B3_PARENT, parent.to_string());
            }
            if !self.debug {
                set(B3_SAMPLED, "1".to_owned());
            }
        }
        if forms.w3c && parent.is_none() {
            headers.remove(TRACESTATE);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const W3C: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const CHANCE: (u128, u64) = (0xabc, 0xdef);

    fn headers(all: &[(&str, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn half() -> Share {
        "50%".parse().unwrap()
    }

    /// What is sent on; `None`: what came.
    fn sent(all: &[(&str, &str)], share: Share) -> Option<Vec<(String, String)>> {
        let mut headers = headers(all);
        place(&read(&headers), share, || CHANCE)?.write(&mut headers);
        let text = |value: &HeaderValue| value.to_str().unwrap().to_owned();
        let mut sent: Vec<_> = headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        sent.sort();
        Some(sent)
    }

    fn check(all: &[(&str, &str)], share: Share, expected: &[(&str, &str)]) {
        let expected: Vec<_> = expected.iter().map(|it| (it.0.to_owned(), it.1.to_owned())).collect();
        assert_eq!(sent(all, share), Some(expected), "{all:?}");
    }

    #[test]
    fn a_context_goes_on_with_our_span_in_the_form_that_it_came_in() {
        let next = "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000def-01";
        let state = ("tracestate", "a=1,b=2");
        let none: Share = "0%".parse().unwrap();
        check(&[("traceparent", W3C), state], none, &[("traceparent", next), state]);
        // One of the future, and flags that nobody knows.
        let future = W3C.replacen("00", "cc", 1).replace("-01", "-ff-more");
        check(&[("traceparent", &future)], none, &[("traceparent", &next.replace("-01", "-03"))]);

        let (trace, span) = ("80f198ee56343ba864fe8b2a57d3eff7", "e457b5a2e4d86bd1");
        let long = format!("{trace}-0000000000000def-1-{span}");
        for came in [format!("{trace}-{span}-1"), format!("{trace}-{span}-1-05e3ac9a4f6e3b90")] {
            check(&[("b3", &came)], none, &[("b3", &long)]);
        }
        let short = format!("64fe8b2a57d3eff7-{span}-d");
        check(&[("b3", &short)], none, &[("b3", &format!("64fe8b2a57d3eff7-0000000000000def-d-{span}"))]);
        check(
            &[("x-b3-traceid", trace), ("x-b3-spanid", span), ("x-b3-sampled", "1")],
            none,
            &[
                ("x-b3-parentspanid", span),
                ("x-b3-sampled", "1"),
                ("x-b3-spanid", "0000000000000def"),
                ("x-b3-traceid", trace),
            ],
        );
        // Both of one trace; both of two.
        let b3 = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1";
        let b3_next = "4bf92f3577b34da6a3ce929d0e0e4736-0000000000000def-1-00f067aa0ba902b7";
        check(&[("b3", b3), ("traceparent", W3C)], none, &[("b3", b3_next), ("traceparent", next)]);
        check(&[("b3", &short), ("traceparent", W3C)], none, &[("b3", &short), ("traceparent", next)]);
    }

    #[test]
    fn what_is_decided_is_respected_and_what_is_not_is_decided_by_the_share() {
        let unsampled = W3C.replace("-01", "-00");
        let (trace, span) = ("80f198ee56343ba864fe8b2a57d3eff7", "e457b5a2e4d86bd1");
        let (no, left) = (format!("{trace}-{span}-0"), format!("{trace}-{span}"));
        for (name, value) in
            [("traceparent", unsampled.as_str()), ("b3", "0"), ("b3", &no), ("x-b3-sampled", "0")]
        {
            assert_eq!(sent(&[(name, value)], Share::ALL), None, "{name}: {value}");
        }
        let parts = [("x-b3-traceid", trace), ("x-b3-spanid", span)];
        assert_eq!(sent(&parts, "0.001%".parse().unwrap()), None, "it is left to others");
        assert!(sent(&parts, Share::ALL).unwrap().contains(&("x-b3-sampled".into(), "1".into())));
        check(&[("b3", &left)], Share::ALL, &[("b3", &format!("{trace}-0000000000000def-1-{span}"))]);
        let new = "00000000000000000000000000000abc-0000000000000def";
        check(&[("b3", "1")], half(), &[("b3", &format!("{new}-1"))]);
        assert_eq!(sent(&[], "0%".parse().unwrap()), None);
        check(&[], half(), &[("traceparent", &format!("00-{new}-01"))]);
        let mut unsampled = HeaderMap::new();
        let it = place(&Said::default(), half(), || (u128::MAX, 1)).unwrap();
        it.write(&mut unsampled);
        assert!(!it.sampled && unsampled["traceparent"].to_str().unwrap().ends_with("-00"));
    }

    #[test]
    fn what_cannot_be_read_begins_a_new_trace() {
        let new = ("traceparent", "00-00000000000000000000000000000abc-0000000000000def-01");
        for bad in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.",
        ] {
            check(&[("traceparent", bad), ("tracestate", "a=1")], Share::ALL, &[new]);
        }
        for (name, bad) in
            [("b3", "1-2-3-4-5"), ("b3", "x"), ("x-b3-traceid", "80f198ee56343ba8"), ("x-b3-sampled", "2")]
        {
            assert!(
                sent(&[(name, bad)], Share::ALL).unwrap().contains(&(new.0.into(), new.1.into())),
                "{name}: {bad}"
            );
        }
        let mut twice = headers(&[("traceparent", W3C)]);
        twice.append("traceparent", W3C.parse().unwrap());
        assert_eq!(read(&twice), Said::default());
    }

    #[test]
    fn shares_are_percentages() {
        let all = |text: &str| text.parse::<Share>().unwrap();
        assert_eq!((all("100%"), all("0%").is_none()), (Share::ALL, true));
        assert!(Share::ALL.takes(u64::MAX) && all("25%").takes((1 << 62) - 1) && !all("25%").takes(1 << 62));
        for bad in ["", "%", "5", "-1%", "101%", "nan%", "inf%", "1 %"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_headers_say_breaks_us_and_what_we_write_we_read(
            all in proptest::collection::vec(
                (
                    proptest::sample::select(vec!["traceparent", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-sampled"]),
                    "[0-9a-fd-]{0,60}|0[01]-[0-9a-f]{32}-[0-9a-f]{16}-0[01]|[0-9a-f]{16}|[0-9a-f]{32}-[0-9a-f]{16}-[01d]",
                ),
                0..4,
            ),
            trace: u128,
            span: u64,
        ) {
            let mut headers: HeaderMap = HeaderMap::new();
            for (name, value) in &all {
                headers.append(*name, value.parse().unwrap());
            }
            if let Some(place) = place(&read(&headers), Share::ALL, || (trace, span)) {
                place.write(&mut headers);
                let again = read(&headers);
                prop_assert_eq!(again.context, Some((place.trace, place.span)));
                prop_assert_eq!(again.sampled, Some(true));
            }
        }
    }
}
