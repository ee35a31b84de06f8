//! Contact with the kernel's search for a listener: what the context of `sk_lookup` tells.

use aya_ebpf::{EbpfContext as _, bindings::bpf_sk_lookup, programs::SkLookupContext};
use mesh_ebpf::abi::{Address, FourTuple};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;

/// The 4-tuple of the packet; `None` for what is not TCP over IP.
#[inline(always)]
pub(crate) fn four_tuple(ctx: &SkLookupContext) -> Option<FourTuple> {
    let lookup = ctx.as_ptr().cast::<bpf_sk_lookup>();
    // All fields at once, and not by way of a reference: the verifier takes no read at an offset that the compiler has
    // made depend on the family. The addresses of the other family read as zero.
    // SAFETY: the context is a `bpf_sk_lookup`, valid for the program's run.
    let (protocol, family, local4, remote4, local6, remote6) = unsafe {
        (
            (&raw const (*lookup).protocol).read_volatile(),
            (&raw const (*lookup).family).read_volatile(),
            (&raw const (*lookup).local_ip4).read_volatile(),
            (&raw const (*lookup).remote_ip4).read_volatile(),
            words(&raw const (*lookup).local_ip6),
            words(&raw const (*lookup).remote_ip6),
        )
    };
    let mapped = 0xffff_u32.to_be();
    let (source, destination) = match family {
        _ if protocol != IPPROTO_TCP => return None,
        AF_INET => (Address([0, 0, mapped, remote4]), Address([0, 0, mapped, local4])),
        AF_INET6 => (Address(remote6), Address(local6)),
        _ => return None,
    };
    // SAFETY: as above.
    let (source_port, destination_port) = unsafe {
        (
            u16::from_be((&raw const (*lookup).remote_port).read_volatile()),
            (&raw const (*lookup).local_port).read_volatile() as u16,
        )
    };
    Some(FourTuple { source, destination, source_port, destination_port })
}

/// # Safety
/// The words are part of the context.
#[inline(always)]
unsafe fn words(address: *const [u32; 4]) -> [u32; 4] {
    let first = address.cast::<u32>();
    // SAFETY: four words, as the type says; the caller answers for the rest.
    unsafe {
        [
            first.read_volatile(),
            first.add(1).read_volatile(),
            first.add(2).read_volatile(),
            first.add(3).read_volatile(),
        ]
    }
}
