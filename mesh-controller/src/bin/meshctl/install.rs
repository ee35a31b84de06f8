//! `meshctl install`, `uninstall` and `check --pre`: the mesh on a Kubernetes cluster, without helm.
//!
//! What is installed is deploy/manifests, of the version that this command is. What is removed is that, whoever
//! installed it, and what agents put on the nodes: a pod on each takes it off once no agent runs. Agents cannot do that
//! when they end, as they end at every update, and must leave pods guarded then.

use std::{future::Future, time::Duration};

use anyhow::{Context, bail, ensure};
use futures_util::{TryStreamExt, stream};
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::{Node, Pod},
};
use kube::{
    Api, Client, Config, Error, ResourceExt,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
        PostParams,
    },
};
use mesh_controller::{conditions, kubernetes::is_conflict};
use serde_json::{Value, json};

/// Everything, as helm would make it with the chart's own settings.
const MANIFESTS: &str = include_str!("../../../../deploy/manifests/nodemesh.yaml");
const NAMESPACE: &str = "nodemesh-system";
const CONTROLLER: &str = "nodemesh-controller";
const AGENT: &str = "nodemesh-agent";
/// Under which name fields of objects are ours.
const MANAGER: &str = "meshctl";
/// The label by which pods that clean up are found.
const CLEANUP: &str = "nodemesh.io/cleanup";
/// How long an agent may take to end, seconds: pods are guarded and take no new connection from then on until their node
/// is clean, so what is uninstalled does not serve on for a successor, as at an update.
const AGENTS_END: u32 = 2;
/// Pods in one answer of the API server, and how many of them are changed at once.
const PAGE: u32 = 500;
const AT_ONCE: usize = 8;
/// Pause between two looks at the cluster.
const LOOK: Duration = Duration::from_millis(500);
/// The oldest Kubernetes that has what the manifests use.
const OLDEST: (u32, u32) = (1, 29);
/// The oldest kernel that capture works on.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Installs, or brings up to this version, and waits until all of it serves.
pub(crate) async fn install(timeout: Duration) -> anyhow::Result<()> {
    let client = client().await?;
    let problems = problems(&client).await?;
    ensure!(problems.is_empty(), "{}", told(&problems));
    for object in objects()? {
        let (api, name) = api_of(&client, &object)?;
        let parameters = PatchParams::apply(MANAGER).force();
        api.patch(&name, &parameters, &Patch::Apply(&object))
            .await
            .with_context(|| format!("cannot make {}", title(&object)))?;
        say(&format!("made {}", title(&object)));
    }
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), NAMESPACE);
    let daemon_sets: Api<DaemonSet> = Api::namespaced(client, NAMESPACE);
    wait("controllers and agents to serve", timeout, || async {
        let controller = deployments.get(CONTROLLER).await?;
        let (wanted, updated, available) = controller.status.as_ref().map_or((0, 0, 0), |it| {
            let number = |field: Option<i32>| field.unwrap_or(0);
            (number(it.replicas), number(it.updated_replicas), number(it.available_replicas))
        });
        let asked = controller.spec.and_then(|it| it.replicas).unwrap_or(1);
        let agents = daemon_sets.get(AGENT).await?;
        let on_nodes = agents.status.as_ref().map_or((0, 0, 0), |it| {
            let (updated, available) = (it.updated_number_scheduled, it.number_available);
            (it.desired_number_scheduled, updated.unwrap_or(0), available.unwrap_or(0))
        });
        let ready = (wanted, updated, available) == (asked, asked, asked)
            && on_nodes.0 > 0
            && on_nodes.1 == on_nodes.0
            && on_nodes.2 == on_nodes.0;
        let seen =
            format!("{available} of {asked} controllers and {} of {} agents serve", on_nodes.2, on_nodes.0);
        Ok(if ready { Ok(()) } else { Err(seen) })
    })
    .await?;
    say("installed. Put a namespace into the mesh: kubectl label namespace NAME nodemesh.io/enroll=true");
    Ok(())
}

/// Removes everything, from the nodes first; `image` is the agents' where none is there to tell.
pub(crate) async fn uninstall(timeout: Duration, image: Option<&str>) -> anyhow::Result<()> {
    let client = client().await?;
    let daemon_sets: Api<DaemonSet> = Api::namespaced(client.clone(), NAMESPACE);
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let ours = objects()?;
    let image = match (image, daemon_sets.get_opt(AGENT).await?) {
        (Some(image), _) => Some(image.to_owned()),
        (None, Some(agents)) => image_of(&agents),
        (None, None) => {
            let template = ours.iter().find(|object| object["kind"] == "DaemonSet");
            let template = template.context("the manifests have agents")?;
            template["spec"]["template"]["spec"]["containers"][0]["image"].as_str().map(str::to_owned)
        }
    };
    let image = image.context("the agents have an image")?;
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(client.clone());
    if namespaces.get_opt(NAMESPACE).await?.is_some() {
        gone(daemon_sets.delete(AGENT, &DeleteParams::foreground()).await.map(drop))?;
        let agents = ListParams::default().labels("app.kubernetes.io/component=agent");
        pods.delete_collection(&DeleteParams::default().grace_period(AGENTS_END), &agents).await?;
        wait("the agents to end", timeout, || async {
            let left = pods.list(&agents).await?;
            let names: Vec<String> = left.items.iter().map(ResourceExt::name_any).collect();
            Ok(if names.is_empty() { Ok(()) } else { Err(format!("there are {}", names.join(", "))) })
        })
        .await?;
        say("no agent runs");
        clean_nodes(&client, &pods, &image, timeout).await?;
    }
    for object in ours.iter().rev() {
        let (api, name) = api_of(&client, object)?;
        gone(api.delete(&name, &DeleteParams::foreground()).await.map(drop))
            .with_context(|| format!("cannot remove {}", title(object)))?;
        say(&format!("removed {}", title(object)));
    }
    // Going takes time: what is in a namespace, or of a kind, goes first.
    for object in &ours {
        let (api, name) = api_of(&client, object)?;
        wait(&format!("{} to go", title(object)), timeout, || async {
            let there = api.get_metadata_opt(&name).await?.is_some();
            Ok(if there { Err("it is there".to_owned()) } else { Ok(()) })
        })
        .await?;
    }
    // Once no controller is there that would write it again.
    forget_capture(&client).await?;
    say("uninstalled");
    Ok(())
}

/// Removes the condition by which pods say that they are captured.
async fn forget_capture(client: &Client) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::all(client.clone());
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let answer = pods.list(&page).await.context("cannot list pods")?;
        let with_condition = answer.items.iter().filter_map(|pod| {
            let (name, condition) = conditions::of_pod(pod)?;
            let says = condition.says.is_some() || condition.unhealthy.is_some();
            says.then_some((name, condition.uid))
        });
        stream::iter(with_condition.map(Ok))
            .try_for_each_concurrent(AT_ONCE, |(name, uid)| async move {
                let pods: Api<Pod> = Api::namespaced(client.clone(), &name.namespace);
                let patch = Patch::Strategic(conditions::removal(&uid));
                match pods.patch_status(&name.name, &PatchParams::default(), &patch).await {
                    // Another pod has the name by now; its status is its own.
                    Err(error) if is_conflict(&error) => Ok(()),
                    patched => gone(patched.map(drop)).with_context(|| format!("cannot change pod {name}")),
                }
            })
            .await?;
        match answer.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// Runs `mesh-agent uninstall` on every node.
async fn clean_nodes(client: &Client, pods: &Api<Pod>, image: &str, timeout: Duration) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let nodes: Vec<String> =
        nodes.list(&ListParams::default()).await?.items.iter().map(ResourceExt::name_any).collect();
    for node in &nodes {
        let pod = serde_json::from_value(cleanup(node, image))?;
        match pods.create(&PostParams::default(), &pod).await {
            Err(error) if is_conflict(&error) => {}
            made => drop(made.with_context(|| format!("cannot clean node {node}"))?),
        }
    }
    wait("all nodes to be clean", timeout, || async {
        let there = pods.list(&ListParams::default().labels(CLEANUP)).await?.items;
        let is_done = |pod: &&Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            phase != Some("Succeeded")
        };
        let left: Vec<&str> =
            there.iter().filter(is_done).filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref()).collect();
        let seen = format!(
            "not done: {}; see kubectl --namespace {NAMESPACE} logs --selector {CLEANUP}",
            left.join(", ")
        );
        Ok(if left.is_empty() { Ok(()) } else { Err(seen) })
    })
    .await?;
    say(&format!("{} nodes are clean", nodes.len()));
    Ok(())
}

/// The pod that takes off a node what agents put there; with what an agent has, and `/run` to remove a directory from.
fn cleanup(node: &str, image: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("nodemesh-cleanup-{node}"), "namespace": NAMESPACE, "labels": {CLEANUP: ""}},
        "spec": {
            "nodeName": node,
            "hostNetwork": true,
            "hostPID": true,
            "restartPolicy": "OnFailure",
            "automountServiceAccountToken": false,
            "priorityClassName": "system-node-critical",
            "tolerations": [{"operator": "Exists"}],
            "securityContext": {
                "seccompProfile": {"type": "RuntimeDefault"},
                "appArmorProfile": {"type": "Unconfined"},
            },
            "containers": [{
                "name": "cleanup",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "args": ["uninstall", "--bpffs", "/sys/fs/bpf/nodemesh", "--run-dir", "/host/run/nodemesh", "--cgroup", "."],
                "securityContext": {
                    "runAsUser": 0,
                    "readOnlyRootFilesystem": true,
                    "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "SETPCAP"]},
                },
                "volumeMounts": [
                    {"name": "bpffs", "mountPath": "/sys/fs/bpf"},
                    {"name": "run", "mountPath": "/host/run"},
                ],
            }],
            "volumes": [
                {"name": "bpffs", "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}},
                {"name": "run", "hostPath": {"path": "/run", "type": "Directory"}},
            ],
        },
    })
}

/// Says what a cluster lacks, before anything is made there; whether it lacks nothing.
pub(crate) async fn check() -> anyhow::Result<bool> {
    let problems = problems(&client().await?).await?;
    if problems.is_empty() {
        say("this cluster can be installed to");
        return Ok(true);
    }
    say(&told(&problems));
    Ok(false)
}

fn told(problems: &[String]) -> String {
    format!("this cluster cannot be installed to; it lacks\n  - {}", problems.join("\n  - "))
}

async fn problems(client: &Client) -> anyhow::Result<Vec<String>> {
    let mut problems = vec![];
    let version = client.apiserver_version().await.context("the API server does not answer")?;
    let said = format!("{}.{}", version.major, version.minor);
    if numbers(&said).is_none_or(|version| version < OLDEST) {
        problems.push(format!("Kubernetes {}.{} or newer: this is {said}", OLDEST.0, OLDEST.1));
    }
    let nodes: Api<Node> = Api::all(client.clone());
    for node in nodes.list(&ListParams::default()).await.context("cannot list nodes")?.items {
        let name = node.name_any();
        let Some(info) = node.status.and_then(|status| status.node_info) else { continue };
        if info.operating_system != "linux" || info.architecture != "amd64" {
            let there = format!("{}/{}", info.operating_system, info.architecture);
            problems.push(format!(
                "linux/amd64 on node {name}, which is {there}: keep agents off it by agent.nodeSelector"
            ));
        } else if numbers(&info.kernel_version).is_none_or(|version| version < OLDEST_KERNEL) {
            let (major, minor) = OLDEST_KERNEL;
            problems.push(format!(
                "Linux {major}.{minor} or newer on node {name}, which has {}",
                info.kernel_version
            ));
        }
    }
    for object in objects()? {
        if let Some(problem) = forbidden(client, &object).await? {
            problems.push(problem);
        }
    }
    problems.dedup();
    Ok(problems)
}

/// What whoever asks may not make.
async fn forbidden(client: &Client, object: &Value) -> anyhow::Result<Option<String>> {
    let resource = resource(object)?;
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some(resource.group.clone()),
                resource: Some(resource.plural.clone()),
                namespace: object["metadata"]["namespace"].as_str().map(str::to_owned),
                verb: Some("create".to_owned()),
                ..Default::default()
            }),
            non_resource_attributes: None,
        },
        ..Default::default()
    };
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = api.create(&PostParams::default(), &review).await.context("cannot ask for rights")?;
    let allowed = answer.status.is_some_and(|status| status.allowed);
    Ok((!allowed)
        .then(|| format!("your right to create {}: ask an administrator of the cluster", resource.plural)))
}

/// `1.34`, `6.18.44-x` → their first two numbers.
fn numbers(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(['.', '-', '+']).map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

async fn client() -> anyhow::Result<Client> {
    let config = Config::infer()
        .await
        .context("no way to a Kubernetes cluster: set KUBECONFIG, or run this where kubectl works")?;
    Ok(Client::try_from(config)?)
}

/// The objects of the manifests, in their order.
fn objects() -> anyhow::Result<Vec<Value>> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(MANIFESTS).context("the built-in manifests are not YAML")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

fn resource(object: &Value) -> anyhow::Result<ApiResource> {
    let text = |key: &str| object[key].as_str().with_context(|| format!("an object has no {key}"));
    let (version, kind) = (text("apiVersion")?, text("kind")?);
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    Ok(ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind)))
}

fn api_of(client: &Client, object: &Value) -> anyhow::Result<(Api<DynamicObject>, String)> {
    let resource = resource(object)?;
    let name = object["metadata"]["name"].as_str().context("an object has no name")?.to_owned();
    let api = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    Ok((api, name))
}

fn title(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

fn image_of(agents: &DaemonSet) -> Option<String> {
    agents.spec.as_ref()?.template.spec.as_ref()?.containers.first()?.image.clone()
}

/// What is gone already is what a removal wants.
fn gone(result: Result<(), Error>) -> anyhow::Result<()> {
    match result {
        Err(Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other?),
    }
}

/// Looks until it holds; at the deadline says what was seen last.
async fn wait<F>(what: &str, timeout: Duration, mut look: impl FnMut() -> F) -> anyhow::Result<()>
where
    F: Future<Output = Result<Result<(), String>, Error>>,
{
    let deadline = tokio::time::Instant::now() + timeout;
    let mut ticks = tokio::time::interval(LOOK);
    loop {
        ticks.tick().await;
        match look().await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(seen)) if tokio::time::Instant::now() >= deadline => {
                bail!("waited {} s for {what}: {seen}", timeout.as_secs())
            }
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error.into()),
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

#[allow(clippy::print_stderr, reason = "progress, for people")]
fn say(what: &str) {
    eprintln!("{what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_of_the_manifests_can_be_asked_for() {
        let objects = objects().unwrap();
        assert!(objects.len() > 5, "{}", objects.len());
        for object in &objects {
            resource(object).unwrap();
            assert!(object["metadata"]["name"].is_string(), "{object}");
        }
        assert_eq!(title(&objects[0]), "Namespace nodemesh-system", "what everything else is in");
        let policy = objects.iter().find(|object| object["kind"] == "NetworkPolicy").unwrap();
        assert_eq!(resource(policy).unwrap().plural, "networkpolicies");
    }

    #[test]
    fn what_cleans_a_node_is_a_pod() {
        serde_json::from_value::<Pod>(cleanup("a", "image")).unwrap();
    }

    #[test]
    fn versions_have_two_numbers() {
        assert_eq!(numbers("1.34"), Some((1, 34)));
        assert_eq!(numbers("1.29+"), Some((1, 29)));
        assert_eq!(numbers("6.18.44-cloud"), Some((6, 18)));
        assert_eq!(numbers("next"), None);
    }
}
