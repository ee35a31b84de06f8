//! What policies ask of requests, to the wire and back.

use super::{WireError, error, proto};
use crate::model;

/// Nothing for what says nothing: most targets are of connections.
pub(super) fn to_proto(asks: &model::Asks) -> Option<proto::Asks> {
    let texts = |patterns: &[model::TextPattern]| patterns.iter().map(ToString::to_string).collect();
    let header = |header: &model::HeaderPattern| proto::HeaderPattern {
        name: header.name.clone(),
        values: texts(&header.values),
    };
    (!asks.is_empty()).then(|| proto::Asks {
        methods: asks.methods.clone(),
        hosts: texts(&asks.hosts),
        paths: texts(&asks.paths),
        headers: asks.headers.iter().map(header).collect(),
    })
}

pub(super) fn from_proto(key: &str, asks: Option<&proto::Asks>) -> Result<model::Asks, WireError> {
    let Some(asks) = asks else { return Ok(model::Asks::default()) };
    let texts = |field: &'static str, texts: &[String]| {
        let parsed = texts.iter().map(|text| text.parse::<model::TextPattern>());
        parsed.collect::<Result<Vec<_>, _>>().map_err(|it| error(key, field, it.to_string()))
    };
    let header = |header: &proto::HeaderPattern| {
        if header.name.is_empty() {
            return Err(error(key, "rules.to.headers.name", "it is empty"));
        }
        let values = texts("rules.to.headers.values", &header.values)?;
        Ok(model::HeaderPattern { name: header.name.clone(), values })
    };
    Ok(model::Asks {
        methods: asks.methods.clone(),
        hosts: texts("rules.to.hosts", &asks.hosts)?,
        paths: texts("rules.to.paths", &asks.paths)?,
        headers: asks.headers.iter().map(header).collect::<Result<_, _>>()?,
    })
}
