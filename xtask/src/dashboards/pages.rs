//! What the dashboards show.

use super::{Choice, Dashboard, Panel, Query, Row, Unit::*, called, each, quantiles, rate, sum};

/// Who answers with an error: `status` of HTTP, or `grpc_status` of a call.
const HTTP_ERRORS: &str = r#"status=~"5..""#;
const GRPC_ERRORS: &str = r#"grpc_status=~"2|4|13|14|15""#;
const REQUESTS: &str = "nodemesh_requests_total";
const BUCKETS: &str = "nodemesh_request_duration_seconds_bucket";
const ATTEMPTS: &str = "nodemesh_request_attempts_total";
const EJECTIONS: &str = "nodemesh_ejections_total";
const FAULTS: &str = "nodemesh_faults_total";
const CONNECTIONS: &str = "nodemesh_connections_total";
const BYTES: &str = "nodemesh_bytes_total";
const LIMIT_HITS: &str = "nodemesh_limit_hits_total";

pub(super) fn all() -> [Dashboard; 6] {
    [mesh(), service(), workload(), route(), agent(), controller()]
}

fn row(title: &'static str, panels: Vec<Panel>) -> Row {
    Row { title, panels }
}

/// The share of requests that fail, for each value of a label.
fn failing(by: &str, which: &str) -> Query {
    let errors = |errors: &str| rate(REQUESTS, &format!("{which}, {errors}"));
    let errors = format!("{} or {}", errors(HTTP_ERRORS), errors(GRPC_ERRORS));
    let all = rate(REQUESTS, which);
    Query {
        expression: format!("sum by ({by}) ({errors}) / sum by ({by}) ({all})"),
        legend: format!("{{{{{by}}}}}"),
    }
}

fn mesh() -> Dashboard {
    let all = r#"direction="outbound""#;
    Dashboard {
        name: "mesh",
        title: "mesh",
        about: "All of it: whether it is whole, what it carries, what it refuses.",
        choices: vec![],
        rows: vec![
            row(
                "Whole?",
                vec![
                    Panel::number("Workloads captured", Count, "sum(nodemesh_enrolled_workloads)"),
                    Panel::number("Workloads not captured", Count, "sum(nodemesh_unprotected_workloads)"),
                    Panel::number("Agents connected", Count, "sum(nodemesh_agents_connected)"),
                    Panel::number("Agents behind", Count, "sum(nodemesh_agents_behind)"),
                    Panel::number("Documents refused", Count, r#"max(nodemesh_documents{state="refused"})"#),
                    Panel::number(
                        "Next certificate ends in",
                        Seconds,
                        "min(nodemesh_certificate_expiry_seconds) - time()",
                    ),
                ],
            ),
            row(
                "Connections",
                vec![
                    Panel::lines(
                        "Ended, by outcome",
                        PerSecond,
                        vec![sum(&["direction", "outcome"], &rate(CONNECTIONS, ""))],
                    ),
                    Panel::lines(
                        "Refused, by reason",
                        PerSecond,
                        vec![sum(&["direction", "reason"], &rate(CONNECTIONS, r#"outcome!="ok""#))],
                    )
                    .about("docs/reference/refusals.md says what each means, and what to do."),
                    Panel::lines("Open", Count, vec![sum(&["direction"], "nodemesh_connections_active")]),
                    Panel::lines(
                        "Bytes",
                        BytesPerSecond,
                        vec![sum(&["direction", "flow"], &rate(BYTES, ""))],
                    ),
                    Panel::lines(
                        "By transport",
                        PerSecond,
                        vec![sum(
                            &["transport"],
                            &rate(CONNECTIONS, r#"direction="outbound", transport!="""#),
                        )],
                    )
                    .about("In a tunnel between two agents, or in plaintext to what is outside."),
                    Panel::lines(
                        "Refused in the kernel",
                        PerSecond,
                        vec![sum(&["reason"], &rate("nodemesh_kernel_refused_total", ""))],
                    ),
                ],
            ),
            row(
                "Requests, where they are read",
                vec![
                    Panel::lines(
                        "By service",
                        PerSecond,
                        vec![sum(&["service"], &rate(REQUESTS, r#"direction="outbound", service!="""#))],
                    ),
                    Panel::lines(
                        "Share that fails, by service",
                        Share,
                        vec![failing("service", r#"direction="outbound", service!="""#)],
                    ),
                    Panel::lines("How long they take", Seconds, quantiles(BUCKETS, all)),
                ],
            ),
            row(
                "Policies and identities",
                vec![
                    Panel::lines(
                        "Refused by policies",
                        PerSecond,
                        vec![
                            sum(
                                &["workload", "reason"],
                                &rate(
                                    CONNECTIONS,
                                    r#"direction="inbound", reason=~"policy_.+|plaintext_to_strict""#,
                                ),
                            ),
                            sum(
                                &["workload", "reason"],
                                &rate(REQUESTS, r#"direction="inbound", reason=~"policy_.+""#),
                            ),
                        ],
                    ),
                    Panel::lines(
                        "Would be refused by audited policies",
                        PerSecond,
                        vec![sum(&["policy", "workload"], &rate("nodemesh_policy_audit_refusals_total", ""))],
                    ),
                    Panel::lines(
                        "Handshakes",
                        PerSecond,
                        vec![sum(&["result"], &rate("nodemesh_handshakes_total", ""))],
                    ),
                ],
            ),
        ],
    }
}

fn service() -> Dashboard {
    let asked = r#"direction="outbound", service=~"$service""#;
    Dashboard {
        name: "service",
        title: "service",
        about: "A service as its clients see it, where its requests are read: told by the agents of those who ask.",
        choices: vec![Choice { label: "service", of: REQUESTS }],
        rows: vec![
            row(
                "What its clients see",
                vec![
                    Panel::lines("Requests, by status", PerSecond, vec![sum(&["status"], &rate(REQUESTS, asked))]),
                    Panel::lines("Share that fails", Share, vec![failing("service", asked)])
                        .about("Answers with 5xx, and calls of gRPC that end with UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE or DATA_LOSS."),
                    Panel::lines("How long requests take", Seconds, quantiles(BUCKETS, asked)),
                ],
            ),
            row(
                "Why",
                vec![
                    Panel::lines("Not answered by a backend, by reason", PerSecond, vec![sum(&["reason"], &rate(REQUESTS, &format!(r#"{asked}, reason!="""#)))])
                        .about("docs/reference/refusals.md says what each means; cut_short: the answer did not come to its end."),
                    Panel::lines(
                        "Attempts for each request",
                        Count,
                        vec![called(
                            "attempts",
                            &format!(
                                "sum({}) / sum({})",
                                rate(ATTEMPTS, r#"service=~"$service""#),
                                rate(REQUESTS, &format!(r#"{asked}, backend!="""#))
                            ),
                        )],
                    )
                    .about("More than one: requests are made again, which adds to the load of what fails."),
                    Panel::lines(
                        "Endpoints left alone, faults on purpose",
                        PerSecond,
                        vec![
                            sum(&["service", "cause"], &rate(EJECTIONS, r#"service=~"$service""#)),
                            sum(&["fault"], &rate(FAULTS, r#"service=~"$service""#)),
                        ],
                    )
                    .about("What its TrafficPolicy does about endpoints that fail, and to requests."),
                    Panel::lines(
                        "Endpoints that fail their health checks",
                        Count,
                        vec![sum(&["service"], r#"nodemesh_unhealthy_endpoints{service=~"$service"}"#)],
                    )
                    .about("meshctl get services says which, why, and whether they are left out."),
                    Panel::lines(
                        "Requests sent to a second endpoint, by whose answer was kept",
                        PerSecond,
                        vec![sum(&["outcome"], &rate("nodemesh_hedges_total", r#"service=~"$service""#))],
                    )
                    .about("Won: the second one's. Few winning means that its policy waits too short a time."),
                    Panel::lines("Calls of gRPC, by status", PerSecond, vec![sum(&["grpc_status"], &rate(REQUESTS, &format!(r#"{asked}, grpc_status!="""#)))]),
                ],
            ),
            row(
                "Who asks, who answers",
                vec![
                    Panel::lines("By client", PerSecond, vec![sum(&["workload"], &rate(REQUESTS, asked))]),
                    Panel::lines("By backend", PerSecond, vec![sum(&["backend"], &rate(REQUESTS, asked))]),
                    Panel::lines("Share that fails, by backend", Share, vec![failing("backend", asked)]),
                ],
            ),
        ],
    }
}

fn workload() -> Dashboard {
    let of = |direction: &str| format!(r#"direction="{direction}", workload=~"$workload""#);
    let (out, inward) = (of("outbound"), of("inbound"));
    let bad = |which: &str| rate(CONNECTIONS, &format!(r#"{which}, outcome!="ok""#));
    Dashboard {
        name: "workload",
        title: "workload",
        about: "A workload: what it opens and asks, and what it is asked.",
        choices: vec![Choice { label: "workload", of: CONNECTIONS }],
        rows: vec![
            row(
                "It opens",
                vec![
                    Panel::lines(
                        "Connections, by outcome",
                        PerSecond,
                        vec![sum(&["outcome", "transport"], &rate(CONNECTIONS, &out))],
                    ),
                    Panel::lines(
                        "Refused and failed, by reason",
                        PerSecond,
                        vec![sum(&["reason"], &bad(&out))],
                    ),
                    Panel::lines(
                        "Requests, by service and status",
                        PerSecond,
                        vec![sum(&["service", "status"], &rate(REQUESTS, &out))],
                    ),
                    Panel::lines(
                        "Share of requests that fails, by service",
                        Share,
                        vec![failing("service", &out)],
                    ),
                    Panel::lines("How long its requests take", Seconds, quantiles(BUCKETS, &out)),
                    Panel::lines(
                        "Attempts at endpoints",
                        PerSecond,
                        vec![sum(&["service"], &rate(ATTEMPTS, r#"workload=~"$workload""#))],
                    ),
                    Panel::lines(
                        "Connections that routes lead, by backend",
                        PerSecond,
                        vec![sum(
                            &["route", "backend", "outcome"],
                            &rate("nodemesh_routed_connections_total", r#"workload=~"$workload""#),
                        )],
                    )
                    .about("TCPRoutes and TLSRoutes."),
                ],
            ),
            row(
                "It is asked",
                vec![
                    Panel::lines(
                        "Connections, by outcome",
                        PerSecond,
                        vec![sum(&["outcome", "transport"], &rate(CONNECTIONS, &inward))],
                    ),
                    Panel::lines(
                        "Refused and failed, by reason",
                        PerSecond,
                        vec![sum(&["reason"], &bad(&inward))],
                    ),
                    Panel::lines(
                        "Requests, by status",
                        PerSecond,
                        vec![sum(&["status", "reason"], &rate(REQUESTS, &inward))],
                    )
                    .about("Where policies say something of requests."),
                    Panel::lines("How long their answers take", Seconds, quantiles(BUCKETS, &inward)),
                    Panel::lines(
                        "Would be refused by audited policies",
                        PerSecond,
                        vec![sum(
                            &["policy", "reason"],
                            &rate("nodemesh_policy_audit_refusals_total", r#"workload=~"$workload""#),
                        )],
                    ),
                ],
            ),
        ],
    }
}

fn route() -> Dashboard {
    let under = r#"direction="outbound", route=~"$route""#;
    let all = rate(REQUESTS, under);
    Dashboard {
        name: "route",
        title: "route",
        about: "A route: where its requests go, in which shares, and what becomes of them.",
        choices: vec![Choice { label: "route", of: REQUESTS }],
        rows: vec![row(
            "Requests",
            vec![
                Panel::lines("By status", PerSecond, vec![sum(&["status"], &all)]),
                Panel::lines("By backend", PerSecond, vec![sum(&["backend"], &all)]),
                Panel::lines(
                    "Share of each backend",
                    Share,
                    vec![Query {
                        expression: format!("sum by (backend) ({all}) / on () group_left () sum({all})"),
                        legend: "{{backend}}".to_owned(),
                    }],
                ),
                Panel::lines("Share that fails, by backend", Share, vec![failing("backend", under)]),
                Panel::lines(
                    "Not answered by a backend, by reason",
                    PerSecond,
                    vec![sum(&["backend", "reason"], &rate(REQUESTS, &format!(r#"{under}, reason!="""#)))],
                ),
                Panel::lines("By client", PerSecond, vec![sum(&["workload"], &all)]),
            ],
        )],
    }
}

fn agent() -> Dashboard {
    let here = r#"instance=~"$instance""#;
    let of = |gauge: &str| format!("{gauge}{{{here}}}");
    let filled = |what: &str| format!("{} / {}", of(what), of(&format!("{what}_limit")));
    Dashboard {
        name: "agent",
        title: "agent",
        about: "An agent and its node: capture, view, certificates, tunnels, and how full is what can become full.",
        choices: vec![Choice { label: "instance", of: "nodemesh_enrolled_workloads" }],
        rows: vec![
            row(
                "Capture",
                vec![
                    Panel::lines(
                        "Workloads",
                        Count,
                        vec![
                            called("captured", &format!("sum({})", of("nodemesh_enrolled_workloads"))),
                            called("not captured", &format!("sum({})", of("nodemesh_unprotected_workloads"))),
                        ],
                    ),
                    Panel::lines(
                        "Repairs",
                        PerSecond,
                        vec![sum(&["instance", "what"], &rate("nodemesh_repairs_total", here))],
                    )
                    .about("Something takes pieces of capture away, and the agent puts them back."),
                    Panel::lines(
                        "New pods that were held, by how it ended",
                        PerSecond,
                        vec![sum(&["outcome"], &rate("nodemesh_holds_total", here))],
                    ),
                    Panel::lines(
                        "Refused in the kernel",
                        PerSecond,
                        vec![sum(&["reason"], &rate("nodemesh_kernel_refused_total", here))],
                    ),
                    Panel::lines(
                        "Connections open",
                        Count,
                        vec![sum(&["direction"], &of("nodemesh_connections_active"))],
                    ),
                    Panel::lines(
                        "Bytes",
                        BytesPerSecond,
                        vec![sum(&["direction", "flow"], &rate(BYTES, here))],
                    ),
                ],
            ),
            row(
                "View",
                vec![
                    Panel::lines(
                        "Controller connected",
                        Count,
                        vec![each("min", &["instance"], &of("nodemesh_controller_connected"))],
                    ),
                    Panel::lines("Entries", Count, vec![sum(&["kind"], &of("nodemesh_view_entries"))]),
                    Panel::lines(
                        "Addresses asked for",
                        Count,
                        vec![each("max", &["instance"], &of("nodemesh_addresses_asked"))],
                    ),
                    Panel::lines(
                        "In plaintext for want of an answer",
                        PerSecond,
                        vec![sum(&["instance"], &rate("nodemesh_plaintext_unanswered_total", here))],
                    ),
                    Panel::lines(
                        "Not saved",
                        Count,
                        vec![each("max", &["instance", "file"], &of("nodemesh_state_unsaved"))],
                    ),
                    Panel::lines(
                        "Damaged, or of a restored controller",
                        PerSecond,
                        vec![
                            sum(&["file"], &rate("nodemesh_state_damaged_total", here)),
                            called(
                                "view restored",
                                &format!("sum({})", rate("nodemesh_views_restored_total", here)),
                            ),
                        ],
                    ),
                ],
            ),
            row(
                "Identity",
                vec![
                    Panel::lines(
                        "Certificates end in",
                        Seconds,
                        vec![each(
                            "min",
                            &["identity"],
                            &format!("{} - time()", of("nodemesh_certificate_expiry_seconds")),
                        )],
                    ),
                    Panel::lines(
                        "Identities that get none",
                        Count,
                        vec![each("max", &["instance"], &of("nodemesh_certificates_failing"))],
                    ),
                    Panel::lines(
                        "Clock ahead of the controller's, or behind",
                        Seconds,
                        vec![each(
                            "max",
                            &["instance"],
                            &format!("abs({})", of("nodemesh_clock_skew_seconds")),
                        )],
                    ),
                    Panel::lines("Tunnels", Count, vec![sum(&["state"], &of("nodemesh_tunnels"))]),
                    Panel::lines(
                        "Handshakes",
                        PerSecond,
                        vec![sum(&["result"], &rate("nodemesh_handshakes_total", here))],
                    ),
                ],
            ),
            row(
                "Room",
                vec![
                    Panel::lines(
                        "Open files, of what may be",
                        Share,
                        vec![each("max", &["instance"], &filled("nodemesh_open_files"))],
                    ),
                    Panel::lines(
                        "Waiting for readers, of what may",
                        Share,
                        vec![each("max", &["instance"], &filled("nodemesh_stalled_buffers"))],
                    ),
                    Panel::lines(
                        "Kernel maps, of what they take",
                        Share,
                        vec![each(
                            "max",
                            &["map"],
                            &format!(
                                "{} / {}",
                                of("nodemesh_kernel_map_entries"),
                                of("nodemesh_kernel_map_limit")
                            ),
                        )],
                    )
                    .about("probes is full by design: the least recently used goes."),
                    Panel::lines("Limits hit", PerSecond, vec![sum(&["limit"], &rate(LIMIT_HITS, here))]),
                    Panel::lines(
                        "Lines of the access log that are lost",
                        PerSecond,
                        vec![
                            called(
                                "could not keep up",
                                &format!("sum({})", rate("nodemesh_access_log_dropped_total", here)),
                            ),
                            called(
                                "no room",
                                &format!("sum({})", rate("nodemesh_access_log_unwritten_total", here)),
                            ),
                        ],
                    ),
                    Panel::lines(
                        "Spans",
                        PerSecond,
                        vec![
                            called(
                                "taken by the collector",
                                &format!("sum({})", rate("nodemesh_spans_exported_total", here)),
                            ),
                            sum(&["why"], &rate("nodemesh_spans_dropped_total", here)),
                        ],
                    ),
                    Panel::lines(
                        "View in force",
                        Count,
                        vec![each("count", &["version"], &of("nodemesh_view_info"))],
                    ),
                ],
            ),
        ],
    }
}

fn controller() -> Dashboard {
    let here = r#"instance=~"$instance""#;
    let of = |gauge: &str| format!("{gauge}{{{here}}}");
    let each_one = |gauge: &str| vec![each("max", &["instance"], &of(gauge))];
    Dashboard {
        name: "controller",
        title: "controller",
        about: "The controllers: whom they serve, what they sign, what they could not do.",
        choices: vec![Choice { label: "instance", of: "nodemesh_agents_connected" }],
        rows: vec![
            row(
                "Agents",
                vec![
                    Panel::lines("Connected", Count, each_one("nodemesh_agents_connected")),
                    Panel::lines("Behind what they were sent", Count, each_one("nodemesh_agents_behind")),
                    Panel::lines(
                        "Views sent",
                        PerSecond,
                        vec![sum(&["instance"], &rate("nodemesh_views_sent_total", here))],
                    ),
                    Panel::lines(
                        "Refused before they were served",
                        PerSecond,
                        vec![sum(&["instance"], &rate("nodemesh_handshakes_refused_total", here))],
                    ),
                    Panel::lines("Limits hit", PerSecond, vec![sum(&["limit"], &rate(LIMIT_HITS, here))]),
                    Panel::lines("Views by demand", Count, each_one("nodemesh_views_by_demand")),
                ],
            ),
            row(
                "Source",
                vec![
                    Panel::lines("Leads", Count, each_one("nodemesh_controller_leader")),
                    Panel::lines("Source answers", Count, each_one("nodemesh_controller_source_connected")),
                    Panel::lines(
                        "Documents",
                        Count,
                        vec![each("max", &["state"], &of("nodemesh_documents"))],
                    ),
                    Panel::lines(
                        "Conditions of pods written",
                        PerSecond,
                        vec![sum(&["result"], &rate("nodemesh_pod_conditions_written_total", here))],
                    ),
                ],
            ),
            row(
                "Authority and state",
                vec![
                    Panel::lines(
                        "Certificates signed",
                        PerSecond,
                        vec![sum(&["kind"], &rate("nodemesh_certificates_issued_total", here))],
                    ),
                    Panel::lines(
                        "Joins",
                        PerSecond,
                        vec![sum(&["result"], &rate("nodemesh_joins_total", here))],
                    ),
                    Panel::lines(
                        "Roots end in",
                        Seconds,
                        vec![each(
                            "min",
                            &["root"],
                            &format!("{} - time()", of("nodemesh_root_expiry_seconds")),
                        )],
                    ),
                    Panel::lines(
                        "Not saved",
                        Count,
                        vec![each("max", &["part"], &of("nodemesh_controller_state_unsaved"))],
                    ),
                    Panel::lines(
                        "Restored from an older state",
                        Count,
                        each_one("nodemesh_controller_restored"),
                    ),
                ],
            ),
        ],
    }
}
