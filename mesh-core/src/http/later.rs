//! What a server says of when it wants to be asked again. The caller brings the time.

use std::time::{Duration, SystemTime};

use http::{
    HeaderMap, HeaderName, StatusCode,
    header::{DATE, RETRY_AFTER},
};

/// "gRPC Retry Design" (A6), "Pushback".
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// When the same request may be made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Later {
    /// Not before this time has passed; a little later is as good.
    NotBefore(Duration),
    /// When this time has passed.
    Exactly(Duration),
    /// Not at all.
    Never,
}

/// What an answer with these headers says of that: to a call by gRPC's own word, else by `Retry-After`.
pub fn of(headers: &HeaderMap, now: SystemTime) -> Option<Later> {
    pushback(headers).or_else(|| retry_after(headers, now).map(Later::NotBefore))
}

/// Whether an answer with this status and `Retry-After` is a server's word that it has too much to do.
pub fn is_too_much(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

/// For how long `Retry-After` wants nothing to be asked (RFC 9110, section 10.2.3), in seconds or until a date. A date is
/// by the server's own clock, where the answer says how late it is there. Of several the longest time counts.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let texts = headers.get_all(RETRY_AFTER).iter().filter_map(|value| value.to_str().ok());
    let times = texts.filter_map(|text| {
        let text = text.trim();
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            // More than fits is longer than anybody waits.
            return Some(text.parse().map_or(Duration::MAX, Duration::from_secs));
        }
        let until = httpdate::parse_http_date(text).ok()?;
        let said = headers.get(DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        // What is over is no time at all.
        Some(until.duration_since(said.unwrap_or(now)).unwrap_or_default())
    });
    times.max()
}

/// Milliseconds; a negative number, and what is none, is never.
fn pushback(headers: &HeaderMap) -> Option<Later> {
    let value = headers.get(PUSHBACK)?;
    let ms = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
    Some(ms.map_or(Later::Never, |ms| Later::Exactly(Duration::from_millis(ms))))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    /// 1994-11-06 08:49:37 UTC.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn a_time_is_in_seconds_or_a_date_in_each_of_its_three_forms() {
        for (text, expected) in [
            ("0", Some(0)),
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10)),
            ("Sunday, 06-Nov-94 08:49:47 GMT", Some(10)),
            ("Sun Nov  6 08:49:47 1994", Some(10)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            let said = retry_after(&headers(&[("retry-after", text)]), now());
            assert_eq!(said, expected.map(Duration::from_secs), "{text}");
        }
        let endless = "9".repeat(40);
        assert_eq!(retry_after(&headers(&[("retry-after", &endless)]), now()), Some(Duration::MAX));
        assert_eq!(retry_after(&headers(&[]), now()), None);
    }

    #[test]
    fn a_date_is_by_the_servers_own_clock_and_of_several_times_the_longest_counts() {
        let skewed =
            [("date", "Sun, 06 Nov 2044 08:49:37 GMT"), ("retry-after", "Sun, 06 Nov 2044 08:49:40 GMT")];
        assert_eq!(retry_after(&headers(&skewed), now()), Some(Duration::from_secs(3)));
        let several =
            [("retry-after", "3"), ("retry-after", "x"), ("retry-after", "5"), ("retry-after", "4")];
        assert_eq!(retry_after(&headers(&several), now()), Some(Duration::from_secs(5)));
    }

    #[test]
    fn a_calls_own_word_comes_first_and_what_is_no_number_of_it_is_never() {
        let ms = |ms| Some(Later::Exactly(Duration::from_millis(ms)));
        for (text, expected) in
            [("0", ms(0)), ("250", ms(250)), ("-1", Some(Later::Never)), ("soon", Some(Later::Never))]
        {
            let said = of(&headers(&[("grpc-retry-pushback-ms", text), ("retry-after", "9")]), now());
            assert_eq!(said, expected, "{text}");
        }
        let plain = of(&headers(&[("retry-after", "9")]), now());
        assert_eq!(plain, Some(Later::NotBefore(Duration::from_secs(9))));
        assert_eq!(of(&headers(&[]), now()), None);
    }

    proptest! {
        #[test]
        fn nothing_that_a_server_says_does_harm(
            said in "[ -~]{0,40}", date in "[ -~]{0,40}", ms in "[ -~]{0,12}",
        ) {
            let all = [("retry-after", said.as_str()), ("date", &date)];
            let _ = of(&headers(&all), now());
            prop_assert!(of(&headers(&[("grpc-retry-pushback-ms", &ms)]), now()).is_some());
        }
    }
}
