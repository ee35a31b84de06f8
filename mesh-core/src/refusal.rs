//! Every reason for which the mesh ends a connection on purpose, with the step that said so.
//!
//! One list for the metric label, the access-log field, the line that the command prints and the page. A new reason
//! does not compile until it has a label, a step, an explanation and a cure.

use serde::{Deserialize, Serialize};

/// The step of a connection's life at which it ended; the steps of `docs/LIFE_OF_A_CONNECTION.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Who is asking.
    Identify,
    /// What they asked for.
    Route,
    /// May they.
    Authorize,
    /// Which endpoint.
    Balance,
    /// The way there: dial, handshake, OPEN.
    Connect,
    /// The bytes.
    Relay,
}

macro_rules! reasons {
    ($($variant:ident = $label:literal at $step:ident, $says:literal, cure $cure:literal;)*) => {
        /// Why a connection was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason { $(#[doc = $says] $variant,)* }

        impl Reason {
            /// All reasons, in the order of the steps; what the reference and the metrics enumerate.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The bounded label of metrics and logs.
            pub const fn label(self) -> &'static str { match self { $(Reason::$variant => $label,)* } }

            /// The step that says it.
            pub const fn step(self) -> Step { match self { $(Reason::$variant => Step::$step,)* } }

            /// What happened, for a person.
            pub const fn says(self) -> &'static str { match self { $(Reason::$variant => $says,)* } }

            /// What to do about it, for a person.
            pub const fn cure(self) -> &'static str { match self { $(Reason::$variant => $cure,)* } }

            /// The reason with this label.
            pub fn parse(label: &str) -> Option<Self> {
                match label { $($label => Some(Reason::$variant),)* _ => None }
            }
        }
    };
}

reasons! {
    ViewMissing = "view_missing" at Identify, "The agent has no view yet",
        cure "check that the agent reaches the controller: meshctl status";
    LoopToListener = "loop_to_listener" at Identify, "The application connected to the agent's own listener",
        cure "connect to the service's address instead";
    IdentityMismatch = "identity_mismatch" at Identify, "The source's certificate is not the one its address has in the view",
        cure "check that the source's service account and address agree with its Workload";
    SourceNotCovered = "source_not_covered" at Identify, "OPEN names a source that the certificate does not cover",
        cure "this is an attack or a broken agent: look at the source node";
    SourceUnanswered = "source_unanswered" at Identify, "The controller has not said in time whose address the source's is",
        cure "check that the agent reaches the controller: meshctl status";
    HandshakeFailed = "handshake_failed" at Identify, "The source's TLS handshake failed",
        cure "look at both agents' logs: certificate, trust domain and clock of the source";
    HandshakeTimeout = "handshake_timeout" at Identify, "The source did not finish its TLS handshake in time",
        cure "look at the load of the source node and at the network between";
    CertificateMissing = "certificate_missing" at Identify, "The source showed no certificate",
        cure "this is no agent of the mesh, or an attack: look at the source node";
    CertificateExpired = "certificate_expired" at Identify, "The source's certificate has expired",
        cure "check that the source's agent reaches the controller: meshctl status; then both nodes' clocks";
    CertificateNotYetValid = "certificate_not_yet_valid" at Identify, "The source's certificate is not valid yet",
        cure "compare both nodes' clocks with the controller's";
    CertificateUntrusted = "certificate_untrusted" at Identify, "The source's certificate does not lead to a root of the mesh",
        cure "the source is of another mesh, or missed a rotation of the root, or this is an attack";
    CertificatePurpose = "certificate_purpose" at Identify, "The source's certificate is not made for what it was used for",
        cure "this is an attack, or a certificate from elsewhere: look at the source node";
    CertificateIdentity = "certificate_identity" at Identify, "The source's certificate does not carry exactly one identity of this mesh",
        cure "this is an attack, or a certificate from elsewhere: look at the source node";
    OpenElsewhere = "open_elsewhere" at Identify, "OPEN asks for another port or family than its tunnel's",
        cure "this is an attack or a broken agent: look at the source node";
    FrameOutOfTurn = "frame_out_of_turn" at Identify, "The peer sent a frame that has no place there",
        cure "this is an attack or a broken agent: look at the peer's node";
    BadFrame = "bad_frame" at Identify, "The peer broke the tunnel protocol",
        cure "compare the agents' versions: meshctl status";
    OpenTimeout = "open_timeout" at Identify, "The peer opened a tunnel and asked for nothing in time",
        cure "look at the source agent";
    TokenMissing = "token_missing" at Identify, "The request bears no end user's token, and one is required",
        cure "send one where the AuthenticationPolicy looks for it, or make the policy Optional";
    TokenMalformed = "token_malformed" at Identify, "The end user's token is no signed JWT with an expiry, or is too long",
        cure "look at what the client sends: a JWT (JWS compact) of 16 KiB at most, with exp";
    TokenAmbiguous = "token_ambiguous" at Identify, "The request bears more than one end user's token",
        cure "let the client send one token in one place";
    TokenIssuer = "token_issuer" at Identify, "No issuer of the AuthenticationPolicy has issued the token, or not for this place",
        cure "compare the token's iss with spec.issuers, and where it is with the issuer's from";
    TokenKeyUnknown = "token_key_unknown" at Identify, "The issuer has no key of the name that the token gives",
        cure "the issuer may have rotated its keys: read the policy's condition KeysFetched, or update jwks.inline";
    TokenAlgorithm = "token_algorithm" at Identify, "The token is signed by no algorithm that is taken, or by none of its key",
        cure "let the issuer sign with RS, PS, ES256, ES384 or EdDSA and the key that it publishes; else this is an attack";
    TokenSignature = "token_signature" at Identify, "The token's signature is not its issuer's",
        cure "the token was changed or forged, or the keys are of another issuer";
    TokenExpired = "token_expired" at Identify, "The token has expired",
        cure "let the client get a new one; else compare the node's clock with the issuer's";
    TokenNotYetValid = "token_not_yet_valid" at Identify, "The token is not valid yet",
        cure "compare the node's clock with the issuer's";
    TokenAudience = "token_audience" at Identify, "The token is not for this audience",
        cure "let the client ask for a token for one of the issuer's audiences in the policy";
    TokenUnreadable = "token_unreadable" at Identify, "What came to a port with an AuthenticationPolicy is no HTTP that can be read",
        cure "name the ports that speak HTTP in the policy: ports: [8080]";
    NoSuchServicePort = "no_such_service_port" at Route, "The service has no such port",
        cure "add the port to the Service, or connect to one that it has";
    NoEndpoint = "no_endpoint" at Route, "The service has no ready endpoint",
        cure "check the Service's selector and the readiness of the workloads: meshctl get services";
    DestinationUnknown = "destination_unknown" at Route, "The destination is not a workload of this node",
        cure "the source's view may be old: meshctl status";
    DestinationUnanswered = "destination_unanswered" at Route, "The controller has not said in time whose address the destination is, and the source is strict",
        cure "check that the agent reaches the controller: meshctl status; if it does, the source asks for more addresses than it may: nodemesh_limit_hits_total{limit=\"addresses\"}";
    DestinationNotCaptured = "destination_not_captured" at Route, "The destination is strict and not captured yet, so it would be plaintext",
        cure "wait for its enrolment, or read why it failed: meshctl get workloads";
    BadRequest = "bad_request" at Identify, "The request is none that a server could read in one way only",
        cure "the client is broken, or this is an attack; where the port speaks no HTTP, take the route away";
    NoRule = "no_rule" at Route, "The port has routes, and the request falls under no rule of theirs",
        cure "add a rule, or ask for what one matches: meshctl get routes";
    NoBackend = "no_backend" at Route, "The route leads to a backend that is not there, or that it may not refer to",
        cure "read the route's condition ResolvedRefs";
    NoServerName = "no_server_name" at Route, "The port has TLSRoutes, and none is for the name that the client asks for in TLS, if it does",
        cure "add the name to a route's hostnames, or ask for one that is there: meshctl get routes";
    BadHello = "bad_hello" at Route, "The port has TLSRoutes, and what the client sent is no beginning of TLS",
        cure "let the client speak TLS from the first byte on, with a ClientHello of 16 KiB at most, or take the route away";
    HelloTimeout = "hello_timeout" at Route, "The port has TLSRoutes, and the client did not say in time which name it asks for",
        cure "look at the client; where the server speaks first on this port, take the route away";
    PlaintextToStrict = "plaintext_to_strict" at Authorize, "The destination is strict and the source spoke plaintext",
        cure "enrol the source, or make the destination's namespace permissive";
    PolicyDeny = "policy_deny" at Authorize, "A deny rule of an AuthorizationPolicy matches",
        cure "change the named rule if the connection is meant to be";
    PolicyNotAllowed = "policy_not_allowed" at Authorize, "Allow policies select the destination and none of their rules matches",
        cure "add an allow rule for this source and port";
    NoCertificate = "no_certificate" at Connect, "The agent has no valid certificate for the workload",
        cure "check that the agent reaches the controller: meshctl status";
    DialRefused = "dial_refused" at Connect, "The destination refused the connection",
        cure "check that the application listens on this port";
    DialTimeout = "dial_timeout" at Connect, "The destination did not answer the connection in time",
        cure "check the network between the nodes and NetworkPolicy";
    DialFailed = "dial_failed" at Connect, "The connection to the destination failed",
        cure "look at the agent's log and the network between the nodes";
    PeerHandshakeFailed = "peer_handshake_failed" at Connect, "The TLS handshake with the destination's agent failed",
        cure "look at both agents' logs: certificate, trust domain and clock";
    PeerCertificateExpired = "peer_certificate_expired" at Connect, "The destination's certificate has expired",
        cure "check that the destination's agent reaches the controller: meshctl status; then both nodes' clocks";
    PeerCertificateNotYetValid = "peer_certificate_not_yet_valid" at Connect, "The destination's certificate is not valid yet",
        cure "compare both nodes' clocks with the controller's";
    PeerCertificateUntrusted = "peer_certificate_untrusted" at Connect, "The destination's certificate does not lead to a root of the mesh",
        cure "the destination is of another mesh, or missed a rotation of the root, or this is an attack";
    PeerCertificatePurpose = "peer_certificate_purpose" at Connect, "The destination's certificate is not made for what it was used for",
        cure "this is an attack, or a certificate from elsewhere: look at the destination node";
    PeerCertificateIdentity = "peer_certificate_identity" at Connect, "The destination's certificate does not carry exactly one identity of this mesh",
        cure "this is an attack, or a certificate from elsewhere: look at the destination node";
    PeerHandshakeTimeout = "peer_handshake_timeout" at Connect, "The destination's agent did not finish the TLS handshake in time",
        cure "look at the load of the destination node";
    PeerIdentityMismatch = "peer_identity_mismatch" at Connect, "The destination's certificate is not the destination workload's",
        cure "an address may have moved: compare meshctl get workloads with the node";
    PeerRefused = "peer_refused" at Connect, "The destination's agent refused the connection",
        cure "its access log has the reason";
    PeerLost = "peer_lost" at Connect, "The destination's agent went away before it took the connection",
        cure "check the destination's agent";
    LimitConnections = "limit_connections" at Connect, "The workload has as many connections as it may",
        cure "raise max_connections_per_workload, or find what holds them";
    LimitHandshakes = "limit_handshakes" at Identify, "As many handshakes are under way as may be",
        cure "find what opens so many connections: the access log has the source";
    LimitDescriptors = "limit_descriptors" at Connect, "The agent may open no more files, or the workload has as many connections as are left for all others of the node",
        cure "raise the agent's limit of open files (LimitNOFILE of its service), or find what holds so many connections";
    LimitStalled = "limit_stalled" at Relay, "So much waits for a reader who does not read that there is no room for more of it",
        cure "find who does not read: the access log has both ends; raise --stalled-memory if so many may be slow at once";
    RequestTimeout = "request_timeout" at Relay, "The rule's time for the request was over before its answer began",
        cure "look at the backend, or raise the rule's timeouts";
    BackendReset = "backend_reset" at Relay, "The backend's connection broke before it had answered",
        cure "look at the backend's log and at its agent's access log";
    LimitServiceConnections = "limit_service_connections" at Connect, "The node has as many connections to the service as a TrafficPolicy lets it have",
        cure "raise limits.connections of the policy: meshctl get traffic";
    LimitRequests = "limit_requests" at Connect, "As many requests are at the service, and wait to be sent there, as a TrafficPolicy lets be",
        cure "look why the service is slow, or raise limits.requests or limits.pending of the policy: meshctl get traffic";
    FaultInjected = "fault_injected" at Route, "A TrafficPolicy wants this request to fail",
        cure "take the fault out of the policy: meshctl get traffic";
    RequestsUnreadable = "requests_unreadable" at Identify, "What came to a port whose requests are limited is no HTTP that can be read",
        cure "let the TrafficPolicy with rateLimits or sizeLimits name a port that speaks HTTP (sectionName): meshctl get traffic";
    LimitRate = "limit_rate" at Authorize, "The request is one too many for a rate limit of the destination",
        cure "let the client wait as Retry-After says, or raise rateLimits of the policy that the detail names";
    LimitHeaders = "limit_headers" at Authorize, "The request's head is longer than the destination takes",
        cure "look which header is so long (cookies, as a rule), or raise sizeLimits.headerBytes: meshctl get traffic";
    LimitBody = "limit_body" at Authorize, "The request's body is longer than the destination takes",
        cure "let the client send less at a time, or raise sizeLimits.bodyBytes: meshctl get traffic";
    DestinationBecameStrict = "destination_became_strict" at Relay, "The destination became strict while the connection was open in plaintext",
        cure "connect again: it goes through a tunnel once the destination is captured";
    WorkloadLeft = "workload_left" at Relay, "The workload left the mesh, or moved, while the connection was open",
        cure "connect again";
    AgentStopping = "agent_stopping" at Relay, "The agent was stopped and the drain deadline passed",
        cure "raise drain_deadline if connections live longer";
}

impl Reason {
    /// The limit that was hit, as the metric names it; `None` for all other reasons.
    pub fn limit(self) -> Option<&'static str> {
        self.label().strip_prefix("limit_")
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PolicyDeny` → `policy_deny`: what serde's `rename_all` makes of the variant in the access log.
    fn snake_case(reason: Reason) -> String {
        let mut text = String::new();
        for c in format!("{reason:?}").chars() {
            if c.is_uppercase() && !text.is_empty() {
                text.push('_');
            }
            text.extend(c.to_lowercase());
        }
        text
    }

    #[test]
    fn log_and_metric_use_the_same_word_and_it_reads_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.label()), Some(*reason));
            assert_eq!(snake_case(*reason), reason.label());
        }
    }
}
