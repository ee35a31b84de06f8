//! The places at which programs are attached.

use aya::programs::TcAttachType;

use crate::net::netns::Namespace;

/// Where a program of a workload goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// Whose it is; part of the names under which it is found again.
    pub(super) owner: &'a str,
    /// Which.
    pub(super) hook: Hook,
    /// The namespace of the interface.
    pub(super) namespace: &'a Namespace,
    /// The interface.
    pub(super) ifindex: u32,
}

/// One program at one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Pod's end, egress.
    CaptureOutbound,
    /// Pod's `lo`, ingress.
    Deliver,
    /// Pod's end, ingress.
    CaptureInbound,
    /// Node's end, ingress.
    GuardFromPod,
    /// Node's end, egress.
    GuardToPod,
    /// Node's end, ingress, of a veth whose workload is not known yet.
    HoldNew,
}

impl Hook {
    /// Those of an enrolled workload.
    pub const OF_WORKLOAD: [Hook; 5] =
        [Hook::Deliver, Hook::CaptureOutbound, Hook::CaptureInbound, Hook::GuardFromPod, Hook::GuardToPod];
    /// All of them.
    pub const ALL: [Hook; 6] = [
        Hook::Deliver,
        Hook::CaptureOutbound,
        Hook::CaptureInbound,
        Hook::GuardFromPod,
        Hook::GuardToPod,
        Hook::HoldNew,
    ];

    /// The program's name in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::CaptureOutbound => "capture_outbound",
            Self::Deliver => "deliver",
            Self::CaptureInbound => "capture_inbound",
            Self::GuardFromPod => "guard_from_pod",
            Self::GuardToPod => "guard_to_pod",
            Self::HoldNew => "hold_new",
        }
    }

    pub(super) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Deliver | Self::CaptureInbound | Self::GuardFromPod | Self::HoldNew => {
                TcAttachType::Ingress
            }
            Self::CaptureOutbound | Self::GuardToPod => TcAttachType::Egress,
        }
    }
}
