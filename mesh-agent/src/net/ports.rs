//! Which local ports a connection that leaves a workload's namespace may come from: none of [`INNER_PORTS`].
//!
//! Those belong to the connections that the destination's agent opens to the application in this workload's name. A
//! tunnel from one of them would, sooner or later, have the 4-tuple of such a connection inside the destination's
//! namespace, and its packets would reach the wrong one of the two. The kernel takes ports from
//! `net.ipv4.ip_local_port_range`, which is apart from them unless somebody widened it, as the workload itself may at any
//! time. So the range is looked at for every dial: three system calls beside a handshake.

use std::{fs, io, ops::RangeInclusive};

use mesh_ebpf::abi::INNER_PORTS;

/// Where a port comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The kernel's choice is apart from the inner ports as it is.
    Kernel,
    /// The kernel's choice, if it can be told to take these of its range only (`IP_LOCAL_PORT_RANGE`, since 6.3).
    Narrowed(RangeInclusive<u16>),
    /// None of the kernel's choice is: these are bound instead.
    Bound(RangeInclusive<u16>),
}

/// What is bound where the kernel's range has nothing to offer: where it lies by default, and all above.
const ABOVE: RangeInclusive<u16> = *INNER_PORTS.end() + 1..=u16::MAX;

/// Where a port comes from when the kernel takes it from this range. The larger part beside the inner ports wins.
pub(super) fn source(kernel: &RangeInclusive<u16>) -> Source {
    let below = *kernel.start()..=(*kernel.end()).min(INNER_PORTS.start() - 1);
    let above = (*kernel.start()).max(INNER_PORTS.end() + 1)..=*kernel.end();
    match (below.len(), above.len()) {
        (0, 0) => Source::Bound(ABOVE),
        (some, 0) | (0, some) if some == kernel.len() => Source::Kernel,
        (below_len, above_len) => Source::Narrowed(if above_len >= below_len { above } else { below }),
    }
}

/// `net.ipv4.ip_local_port_range` of the calling thread's namespace; of both families.
pub(super) fn of_kernel() -> io::Result<RangeInclusive<u16>> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = fs::read_to_string(PATH)?;
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(first..=last),
        _ => Err(io::Error::other(format!("{PATH} is not a range of ports: {text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_choice_stands_where_it_is_apart_and_is_narrowed_where_it_is_not() {
        assert_eq!(source(&(32_768..=60_999)), Source::Kernel, "the default");
        assert_eq!(source(&(1024..=9999)), Source::Kernel);
        assert_eq!(source(&(10_000..=65_535)), Source::Narrowed(32_000..=65_535));
        assert_eq!(source(&(1024..=65_535)), Source::Narrowed(32_000..=65_535));
        assert_eq!(source(&(1024..=32_100)), Source::Narrowed(1024..=9999));
        assert_eq!(source(&(10_000..=31_999)), Source::Bound(32_000..=65_535));
        assert_eq!(source(&(20_000..=20_000)), Source::Bound(32_000..=65_535));
    }

    #[test]
    fn no_port_is_an_inner_one() {
        let edges = [1, 2, 1024, 9998, 9999, 10_000, 10_001, 31_998, 31_999, 32_000, 32_001, 65_534, 65_535];
        for (first, last) in edges.iter().flat_map(|first| edges.map(|last| (*first, last))) {
            let kernel = first..=last;
            let ports = match source(&kernel) {
                _ if kernel.is_empty() => continue,
                Source::Kernel => kernel.clone(),
                Source::Narrowed(ports) => {
                    assert!(kernel.contains(ports.start()) && kernel.contains(ports.end()), "only within");
                    ports
                }
                Source::Bound(ports) => ports,
            };
            assert!(!ports.is_empty(), "{kernel:?}");
            assert!(ports.end() < INNER_PORTS.start() || ports.start() > INNER_PORTS.end(), "{ports:?}");
        }
    }

    #[test]
    fn the_kernel_tells_its_range() {
        assert!(!of_kernel().unwrap().is_empty());
    }
}
