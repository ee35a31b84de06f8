//! Grafana's dashboards in deploy/dashboards, made from [`pages`].
//!
//! Invariant: none is written that asks for a metric, or for a label of one, that docs/reference does not have.

mod pages;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use mesh_tests::promql::Known;
use serde_json::{Value, json};

use crate::run::{root, step};

/// Where they are.
pub(crate) const DIRECTORY: &str = "deploy/dashboards";
const REFERENCE: [&str; 2] = ["docs/reference/metrics-agent.md", "docs/reference/metrics-controller.md"];

/// The width of a dashboard, in Grafana's columns.
const COLUMNS: u32 = 24;
/// The version of Grafana's format that these are written in: Grafana 10's. Newer ones read it.
const FORMAT: u32 = 38;

/// A dashboard.
#[derive(Debug)]
struct Dashboard {
    /// The name of its file, and how Grafana knows it.
    name: &'static str,
    title: &'static str,
    about: &'static str,
    /// What its reader chooses.
    choices: Vec<Choice>,
    rows: Vec<Row>,
}

/// A list to choose from: the values of a label.
#[derive(Debug)]
struct Choice {
    label: &'static str,
    /// A metric that has it.
    of: &'static str,
}

#[derive(Debug)]
struct Row {
    title: &'static str,
    panels: Vec<Panel>,
}

#[derive(Debug)]
struct Panel {
    title: &'static str,
    about: &'static str,
    shows: Shows,
    unit: Unit,
    queries: Vec<Query>,
}

#[derive(Debug, Clone, Copy)]
enum Shows {
    /// How something went on.
    Lines,
    /// The last value, large.
    Number,
}

#[derive(Debug, Clone, Copy)]
enum Unit {
    Count,
    PerSecond,
    BytesPerSecond,
    Seconds,
    /// 0 to 1.
    Share,
}

/// An expression, and what its series are called.
#[derive(Debug)]
struct Query {
    expression: String,
    legend: String,
}

impl Panel {
    fn lines(title: &'static str, unit: Unit, queries: Vec<Query>) -> Self {
        Self { title, about: "", shows: Shows::Lines, unit, queries }
    }

    fn number(title: &'static str, unit: Unit, expression: &str) -> Self {
        Self { title, about: "", shows: Shows::Number, unit, queries: vec![called("", expression)] }
    }

    /// What its reader has to know besides.
    fn about(self, about: &'static str) -> Self {
        Self { about, ..self }
    }
}

/// One series, by a name.
fn called(legend: &str, expression: &str) -> Query {
    Query { expression: expression.to_owned(), legend: legend.to_owned() }
}

/// A sum for each combination of these labels, which its series are called by.
fn sum(by: &[&str], of: &str) -> Query {
    each("sum", by, of)
}

fn each(function: &str, by: &[&str], of: &str) -> Query {
    let legend = by.iter().map(|label| format!("{{{{{label}}}}}")).collect::<Vec<_>>().join(" ");
    Query { expression: format!("{function} by ({}) ({of})", by.join(", ")), legend }
}

/// How fast a counter grows; `which` are matchers of its labels.
fn rate(counter: &str, which: &str) -> String {
    format!("rate({counter}{{{which}}}[$__rate_interval])")
}

/// The median and what one in twenty and one in a hundred exceed.
fn quantiles(buckets: &str, which: &str) -> Vec<Query> {
    [("median", 0.5), ("95 %", 0.95), ("99 %", 0.99)]
        .map(|(legend, part)| {
            let rate = rate(buckets, which);
            called(legend, &format!("histogram_quantile({part}, sum by (le) ({rate}))"))
        })
        .into()
}

/// Writes all of them.
pub(crate) fn generate() -> Result<()> {
    step("Write deploy/dashboards", || {
        fs::create_dir_all(root().join(DIRECTORY))?;
        for (path, text) in files()? {
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    })
}

/// Every file of the directory with what has to be in it.
fn files() -> Result<Vec<(PathBuf, String)>> {
    let pages = REFERENCE.map(|page| fs::read_to_string(root().join(page)).unwrap_or_default());
    let known = Known::of_reference(&pages.each_ref().map(String::as_str))?;
    pages::all()
        .iter()
        .map(|dashboard| {
            dashboard.check(&known)?;
            let text = serde_json::to_string_pretty(&dashboard.json())? + "\n";
            Ok((root().join(DIRECTORY).join(format!("{}.json", dashboard.name)), text))
        })
        .collect()
}

impl Dashboard {
    /// Fails when it asks for what nobody has.
    fn check(&self, known: &Known) -> Result<()> {
        for Choice { label, of } in &self.choices {
            let missing = known.missing_from(&format!("{of}{{{label}=\"\"}}"));
            ensure!(missing.is_empty(), "{}: the choice of {label} asks for {missing:?}", self.name);
        }
        for panel in self.rows.iter().flat_map(|row| &row.panels) {
            for query in &panel.queries {
                let missing = known.missing_from(&query.expression);
                ensure!(
                    missing.is_empty(),
                    "{}, {}: {} asks for {missing:?}",
                    self.name,
                    panel.title,
                    query.expression
                );
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let (mut panels, mut y, mut id) = (vec![], 0, 0);
        let mut next = || {
            id += 1;
            id
        };
        for row in &self.rows {
            let place = json!({"x": 0, "y": y, "w": COLUMNS, "h": 1});
            panels.push(json!({
                "type": "row", "id": next(), "title": row.title, "collapsed": false, "gridPos": place, "panels": [],
            }));
            y += 1;
            let (mut x, mut tallest) = (0, 0);
            for panel in &row.panels {
                let (w, h) = panel.shows.size();
                if x + w > COLUMNS {
                    (x, y, tallest) = (0, y + tallest, 0);
                }
                panels.push(panel.json(next(), &json!({"x": x, "y": y, "w": w, "h": h})));
                (x, tallest) = (x + w, tallest.max(h));
            }
            y += tallest;
        }
        let mut choices = vec![
            json!({"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}),
        ];
        choices.extend(self.choices.iter().map(Choice::json));
        json!({
            "uid": format!("nodemesh-{}", self.name),
            "title": format!("Nodemesh: {}", self.title),
            "description": self.about,
            "tags": ["nodemesh"],
            "schemaVersion": FORMAT,
            "editable": true,
            "timezone": "",
            "time": {"from": "now-1h", "to": "now"},
            "refresh": "30s",
            "links": [{"type": "dashboards", "title": "Nodemesh", "tags": ["nodemesh"], "asDropdown": true, "keepTime": true}],
            "templating": {"list": choices},
            "panels": panels,
        })
    }
}

impl Choice {
    fn json(&self) -> Value {
        let query = format!("label_values({}, {})", self.of, self.label);
        json!({
            "type": "query", "name": self.label, "label": self.label, "datasource": source(),
            "definition": query, "query": {"query": query, "refId": self.label},
            "refresh": 2, "sort": 1, "multi": true, "includeAll": true, "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        })
    }
}

impl Panel {
    fn json(&self, id: u32, place: &Value) -> Value {
        let targets = self.queries.iter().zip('A'..).map(|(query, letter)| {
            json!({
                "refId": letter.to_string(), "datasource": source(), "expr": query.expression,
                "legendFormat": query.legend,
            })
        });
        let (kind, options) = match self.shows {
            Shows::Lines => (
                "timeseries",
                json!({
                    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": true},
                    "tooltip": {"mode": "multi", "sort": "desc"},
                }),
            ),
            Shows::Number => {
                ("stat", json!({"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}))
            }
        };
        json!({
            "type": kind, "id": id, "title": self.title, "description": self.about, "datasource": source(),
            "gridPos": place, "options": options, "targets": targets.collect::<Vec<_>>(),
            "fieldConfig": {"defaults": {"unit": self.unit.grafanas(), "min": 0}, "overrides": []},
        })
    }
}

impl Shows {
    /// Width and height.
    fn size(self) -> (u32, u32) {
        match self {
            Self::Lines => (8, 8),
            Self::Number => (4, 4),
        }
    }
}

impl Unit {
    fn grafanas(self) -> &'static str {
        match self {
            Self::Count => "short",
            Self::PerSecond => "cps",
            Self::BytesPerSecond => "Bps",
            Self::Seconds => "s",
            Self::Share => "percentunit",
        }
    }
}

fn source() -> Value {
    json!({"type": "prometheus", "uid": "${datasource}"})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_deploy_dashboards_is_generated() {
        let files = files().unwrap();
        for (path, text) in &files {
            let there = fs::read_to_string(path).unwrap_or_default();
            assert!(there == *text, "{} is stale: cargo xtask generate", path.display());
        }
        let there = fs::read_dir(root().join(DIRECTORY)).unwrap().count();
        assert_eq!(there, files.len(), "nothing else is in {DIRECTORY}");
    }

    #[test]
    fn a_dashboard_that_asks_for_what_nobody_has_is_not_made() {
        let mut known = Known::default();
        known.record("nodemesh_x_total", &["reason"]);
        let dashboard = |query| Dashboard {
            name: "x",
            title: "",
            about: "",
            choices: vec![],
            rows: vec![Row { title: "", panels: vec![Panel::lines("p", Unit::Count, vec![query])] }],
        };
        dashboard(sum(&["reason"], &rate("nodemesh_x_total", "instance=~\"$instance\"")))
            .check(&known)
            .unwrap();
        for (query, complaint) in [
            (sum(&["reason"], "nodemesh_y_total"), "nodemesh_y_total"),
            (sum(&["season"], "nodemesh_x_total"), "season"),
            (called("", "nodemesh_x_total{season=\"1\"}"), "nodemesh_x_total{season}"),
        ] {
            let said = dashboard(query).check(&known).unwrap_err().to_string();
            assert!(said.starts_with("x, p: ") && said.contains(complaint), "{said}");
        }
        let of = Choice { label: "season", of: "nodemesh_x_total" };
        assert!(
            Dashboard { choices: vec![of], ..dashboard(called("", "nodemesh_x_total")) }
                .check(&known)
                .is_err()
        );
    }
}
