//! The way to the Kubernetes API server: a pod's service account, or `KUBECONFIG`.
//!
//! And what all who ask it have in common: that it may be silent, and that another may have written first.

use std::{fmt::Debug, time::Duration};

use kube::{
    Api, Client, Config, Resource,
    api::{Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the API server may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// There is no API server to speak to.
#[derive(Debug, thiserror::Error)]
#[error(
    "no way to a Kubernetes API server: {0}; in a pod its service account has to be mounted, elsewhere KUBECONFIG has to \
     name a kubeconfig"
)]
pub struct KubernetesError(String);

/// The API server did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// It says why, or the way to it failed.
    #[error("{}", says(.0))]
    Refused(Box<kube::Error>),
    /// It may have done it all the same.
    #[error("no answer within {TIMEOUT:?}")]
    Silent,
}

/// A client; whether the API server answers is seen at the first request.
pub async fn client() -> Result<Client, KubernetesError> {
    client_with(|_| {}).await
}

/// The same, with a configuration of its own.
pub(crate) async fn client_with(change: impl FnOnce(&mut Config)) -> Result<Client, KubernetesError> {
    let mut config = Config::infer().await.map_err(|error| KubernetesError(error.to_string()))?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    change(&mut config);
    Client::try_from(config).map_err(|error| KubernetesError(error.to_string()))
}

/// What a call gives, within the time that an API server has.
pub(crate) async fn in_time<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    let answer = tokio::time::timeout(TIMEOUT, call).await.map_err(|_| ApiError::Silent)?;
    answer.map_err(|error| ApiError::Refused(Box::new(error)))
}

/// Puts an object in the place of the edition (`metadata.resourceVersion`) that was read, or makes it where there was none.
/// `false` if somebody else was faster.
pub(crate) async fn put<K>(
    api: &Api<K>,
    mut object: K,
    over: Option<Option<String>>,
) -> Result<bool, ApiError>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    let written = match over {
        Some(edition) => {
            let name = object.meta().name.clone().unwrap_or_default();
            object.meta_mut().resource_version = edition;
            in_time(api.patch(&name, &PatchParams::default(), &Patch::Merge(&object))).await
        }
        None => in_time(api.create(&PostParams::default(), &object)).await,
    };
    match written {
        Ok(_) => Ok(true),
        Err(ApiError::Refused(error)) if is_conflict(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether somebody else has written, or made it, first.
pub fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

/// What an API server said, or why it said nothing.
fn says(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// The name of the pod that this process runs in: its host's name, outside of a pod too.
pub(crate) fn own_pod() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
