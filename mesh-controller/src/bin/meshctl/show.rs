//! Answers as tables.

use std::fmt::Write;

use comfy_table::{Table, presets::NOTHING};
use mesh_controller::admin::answer::{
    AgentRow, AgentState, AuthenticationRow, Certificates, Checked, ConnectionEnd, Connections, Documents,
    Fill, IssuerRow, PolicyRow, Root, RouteRow, ServiceRow, Status, TrafficRow, UnhealthyRow, Why,
    WorkloadRow,
};

pub(crate) fn status(status: &Status) -> String {
    let mut text = format!("controller {}, trust domain {}\n", status.version, status.trust_domain);
    for root in &status.roots {
        line(&mut text, format_args!("root {} until {}", short(&root.sha256), root.not_after));
    }
    for problem in &status.problems {
        line(&mut text, format_args!("PROBLEM {problem}"));
    }
    for agent in &status.agents {
        for problem in &agent.problems {
            line(&mut text, format_args!("PROBLEM on {}: {problem}", agent.node));
        }
    }
    text.push_str(&documents(&status.documents));
    text.push('\n');
    let agents = status.agents.iter().map(|agent| {
        let state = match (agent.connected, agent.in_sync, &agent.since) {
            (true, true, _) => "in sync",
            (true, false, _) => "behind",
            (false, _, Some(_)) => "away",
            (false, _, None) => "never connected",
        };
        [
            agent.node.clone(),
            state.to_owned(),
            agent.since.clone().unwrap_or_default(),
            agent.agent_version.clone(),
            agent.acked_view.clone().unwrap_or_default(),
            agent.current_view.clone(),
            knows(agent),
            fullest(&agent.fills),
            agent.error.clone().unwrap_or_default(),
        ]
    });
    text + &table(
        ["NODE", "AGENT", "SINCE", "VERSION", "VIEW", "NEWEST", "KNOWS", "FULLEST", "ERROR"],
        agents,
    )
}

/// How much of the mesh a node is told.
fn knows(agent: &AgentRow) -> String {
    match (agent.by_demand, agent.resources) {
        (_, 0) => String::new(),
        (true, known) => format!("{known}, asks for {}", agent.addresses_asked),
        (false, known) => format!("all {known}"),
    }
}

/// What is nearest to its limit.
fn fullest(fills: &[Fill]) -> String {
    let fullest = fills.iter().max_by_key(|fill| fill.percent());
    fullest.map_or_else(String::new, |fill| format!("{} {} %", fill.what, fill.percent()))
}

pub(crate) fn documents(documents: &Documents) -> String {
    let mut text = format!("documents: {} accepted, {} refused\n", documents.accepted, documents.refused);
    for problem in &documents.problems {
        let kept = if problem.last_good_in_force { " (another version of it is in force)" } else { "" };
        line(&mut text, format_args!("{problem}{kept}"));
    }
    text
}

pub(crate) fn checked(checked: &Checked) -> String {
    let Checked { accepted, refused, problems, warnings } = checked;
    let mut text =
        format!("documents: {accepted} accepted, {refused} refused; warnings: {}\n", warnings.len());
    for problem in problems {
        line(&mut text, format_args!("error: {problem}"));
    }
    for warning in warnings {
        line(&mut text, format_args!("warning: {warning}"));
    }
    text
}

pub(crate) fn workloads(rows: &[WorkloadRow]) -> String {
    let rows = rows.iter().map(|row| {
        let state = if row.ready { row.enrolment.clone() } else { format!("{}, not ready", row.enrolment) };
        [
            row.name.clone(),
            row.node.clone(),
            list(&row.addresses),
            row.identity.clone(),
            format!("{} ({})", row.mode, row.mode_from),
            state,
            row.reason.clone(),
        ]
    });
    table(["WORKLOAD", "NODE", "ADDRESSES", "IDENTITY", "MODE", "ENROLMENT", "REASON"], rows)
}

pub(crate) fn roots(roots: &[Root]) -> String {
    let rows = roots.iter().map(|root| {
        [
            root.sha256.clone(),
            root.subject.clone(),
            root.since.clone(),
            root.not_after.clone(),
            if root.signs { "signs" } else { "trusted" }.to_owned(),
            root.certificates.to_string(),
        ]
    });
    table(["ROOT (SHA-256)", "SUBJECT", "IN USE SINCE", "VALID UNTIL", "USE", "CERTIFICATES"], rows)
}

pub(crate) fn certificates(answer: &Certificates) -> String {
    let rows = answer.certificates.iter().map(|row| {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let root = text(&row.root);
        let expires = row.expires.clone().unwrap_or_else(|| "none yet".to_owned());
        [row.identity.clone(), row.node.clone(), expires, short(&root).to_owned(), text(&row.error)]
    });
    let mut text = roots(&answer.roots) + "\n";
    text += &table(["IDENTITY", "NODE", "VALID UNTIL", "ROOT", "ERROR"], rows);
    if !answer.silent.is_empty() {
        line(&mut text, format_args!("not known now, their agents are away: {}", answer.silent.join(", ")));
    }
    text
}

fn short(sha256: &str) -> &str {
    &sha256[..16.min(sha256.len())]
}

pub(crate) fn local_certificates(state: &AgentState) -> String {
    let rows = state.workloads.iter().map(|row| {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let expires = row.certificate_expires.clone().unwrap_or_else(|| "none yet".to_owned());
        [text(&row.identity), row.name.clone(), state.node.clone(), expires, text(&row.certificate_error)]
    });
    table(["IDENTITY", "WORKLOAD", "NODE", "VALID UNTIL", "ERROR"], rows)
}

pub(crate) fn connections(answer: &Connections) -> String {
    let end = |end: &ConnectionEnd| {
        let name = end.service.iter().map(|service| format!("{service} at"));
        let workload = end.workload.clone().unwrap_or_else(|| "outside".to_owned());
        let lines = name.chain([workload]).chain(end.address.clone()).chain(end.identity.clone());
        lines.collect::<Vec<_>>().join("\n")
    };
    let rows = answer.connections.iter().map(|row| {
        let transport =
            if row.state == "open" { row.transport.clone() } else { format!("{} (opening)", row.transport) };
        [
            end(&row.source),
            end(&row.destination),
            row.direction.clone(),
            transport,
            row.since.clone(),
            row.bytes_sent.to_string(),
            row.bytes_received.to_string(),
            answer.node.clone(),
        ]
    });
    let header = ["SOURCE", "DESTINATION", "DIRECTION", "TRANSPORT", "SINCE", "SENT", "RECEIVED", "NODE"];
    let mut text = table(header, rows);
    let shown = answer.connections.len();
    if shown < answer.total {
        let total = answer.total;
        line(
            &mut text,
            format_args!("the newest {shown} of {total}: name a workload, or raise --limit, to see others"),
        );
    }
    text
}

pub(crate) fn services(rows: &[ServiceRow]) -> String {
    let lines = rows.iter().flat_map(|row| {
        row.ports.iter().map(move |port| {
            let endpoint = |it: &mesh_core::model::Endpoint| {
                let address = std::net::SocketAddr::new(it.address, it.port);
                match &it.workload {
                    Some(workload) => format!("{workload} {address}"),
                    None => format!("{address}, outside"),
                }
            };
            let unhealthy = |it: &UnhealthyRow| match it.asked {
                true => format!("unhealthy, asked all the same: {}: {}", endpoint(&it.endpoint), it.reason),
                false => format!("unhealthy, left out: {}: {}", endpoint(&it.endpoint), it.reason),
            };
            let healthy = port.endpoints.iter().map(endpoint);
            let endpoints: Vec<String> = healthy.chain(port.unhealthy.iter().map(unhealthy)).collect();
            let endpoints =
                if endpoints.is_empty() { "none is ready".to_owned() } else { endpoints.join("\n") };
            let addresses = if row.addresses.is_empty() { "none".to_owned() } else { list(&row.addresses) };
            [row.name.clone(), addresses, port.name.clone(), port.port.to_string(), endpoints]
        })
    });
    table(["SERVICE", "ADDRESSES", "NAME", "PORT", "ENDPOINTS"], lines)
}

pub(crate) fn policies(rows: &[PolicyRow]) -> String {
    let rows = rows.iter().map(|row| {
        let rules =
            if row.rules.is_empty() { "none: matches nothing".to_owned() } else { row.rules.join("\n") };
        let action = match row.enforcement.as_str() {
            "Enforce" => row.action.clone(),
            other => format!("{}, {}", row.action, other.to_lowercase()),
        };
        [row.name.clone(), action, row.selector.clone(), rules, row.selected.join("\n")]
    });
    table(["POLICY", "ACTION", "SELECTOR", "RULES", "SELECTS"], rows)
}

pub(crate) fn authentication(rows: &[AuthenticationRow]) -> String {
    let issuer = |it: &IssuerRow| {
        let from = it.url.as_ref().map(|url| format!(" of {url}")).unwrap_or_default();
        let keys = match it.keys {
            0 => format!("no key{from}: no token of it is taken"),
            count => format!("{count} key(s){from}"),
        };
        format!("{} for {}, in {}: {keys}", it.issuer, it.audiences.join(" or "), it.places.join(" or "))
    };
    let rows = rows.iter().map(|row| {
        let mut takes = if row.required { "a token".to_owned() } else { "a token or none".to_owned() };
        if row.enforcement != "Enforce" {
            takes += &format!(", {}", row.enforcement.to_lowercase());
        }
        let ports = if row.ports.is_empty() { "all".to_owned() } else { row.ports.join(", ") };
        let issuers: Vec<String> = row.issuers.iter().map(issuer).collect();
        [row.name.clone(), takes, issuers.join("\n"), row.selector.clone(), ports, row.selected.join("\n")]
    });
    table(["POLICY", "WANTS", "ISSUERS", "SELECTOR", "PORTS", "SELECTS"], rows)
}

pub(crate) fn routes(rows: &[RouteRow]) -> String {
    let rows = rows.iter().map(|row| {
        let parents: Vec<String> = row
            .parents
            .iter()
            .map(|parent| match (parent.accepted, parent.says.as_str()) {
                (true, "") => parent.service.clone(),
                (true, says) => format!("{}: {says}", parent.service),
                (false, says) => format!("{}: {}, {says}", parent.service, parent.reason),
            })
            .collect();
        let rules = if row.rules.is_empty() { "none".to_owned() } else { row.rules.join("\n") };
        [row.name.clone(), row.kind.clone(), parents.join("\n"), rules, row.broken.join("\n")]
    });
    table(["ROUTE", "KIND", "SERVICES", "RULES", "LEADS NOWHERE"], rows)
}

pub(crate) fn traffic(rows: &[TrafficRow]) -> String {
    let rows = rows.iter().map(|row| {
        let targets: Vec<String> = row
            .targets
            .iter()
            .map(|it| match it.accepted {
                true => it.target.clone(),
                false => format!("{}: {}, {}", it.target, it.reason, it.says),
            })
            .collect();
        [row.name.clone(), targets.join("\n"), row.says.join("\n"), row.unread.join("\n")]
    });
    table(["POLICY", "FOR", "SAYS", "NOT READ"], rows)
}

pub(crate) fn why(why: &Why) -> String {
    let mut text = format!("{} to {}\n", why.source, why.destination);
    for step in &why.steps {
        line(&mut text, format_args!("  {:<9} {}", step.step, step.says));
    }
    for end in &why.ends {
        let rule = end.rule.as_ref().map_or_else(String::new, |rule| format!(", by rule {rule}"));
        let reason = end.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
        line(
            &mut text,
            format_args!("{} to {}{rule}{reason}: {}", end.verdict.to_uppercase(), end.to, end.says),
        );
        if let Some(would) = &end.would_refuse {
            line(&mut text, format_args!("  audit: {would} would refuse it, were it enforced"));
        }
        if !end.cure.is_empty() {
            line(&mut text, format_args!("  to change it: {}", end.cure));
        }
    }
    text
}

fn list(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("writing to a String never fails");
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header).add_rows(rows);
    let lines = table.to_string();
    // The cells' padding stays between them, not around the whole.
    let bare = |line: &str| line.strip_prefix(' ').unwrap_or(line).trim_end().to_owned() + "\n";
    lines.lines().map(bare).collect()
}
