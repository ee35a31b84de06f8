//! The directory of YAML that the controller reads, and the manifests that worlds put there.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// A directory of manifests. Files are replaced by rename, so the controller never reads half of one.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
}

impl Manifests {
    /// Makes the directory.
    pub fn create(directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a file, whether it was there or not.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.directory.join(file);
        let hidden = self.directory.join(format!(".{file}.new"));
        fs::write(&hidden, text)
            .and_then(|()| fs::rename(&hidden, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// A file's text.
    pub fn read(&self, file: &str) -> Result<String> {
        let path = self.directory.join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Replaces a piece of a file's text that must be there.
    pub fn replace(&self, file: &str, from: &str, to: &str) -> Result<()> {
        let text = self.read(file)?;
        anyhow::ensure!(text.contains(from), "{file} does not contain {from:?}:\n{text}");
        self.write(file, &text.replace(from, to))
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.directory.join(file);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }
}

/// Whether plaintext from outside of the mesh is taken (`nodemesh.io/mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is.
    Permissive,
    /// It is not.
    Strict,
}

/// Whether traffic is captured (`nodemesh.io/enroll`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enrolment {
    /// It is.
    Enrolled,
    /// It is not.
    Outside,
}

impl Mode {
    /// The word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }
}

impl Enrolment {
    fn label(self) -> &'static str {
        match self {
            Self::Enrolled => "true",
            Self::Outside => "false",
        }
    }
}

/// A Namespace.
pub fn namespace(name: &str, enrolment: Enrolment, mode: Mode) -> String {
    let enroll = enrolment.label();
    let mode = mode.label();
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels:\n    nodemesh.io/enroll: \"{enroll}\"\n    nodemesh.io/mode: {mode}\n"
    )
}

/// What a Workload manifest says.
#[derive(Debug)]
pub struct WorkloadManifest<'a> {
    /// `metadata.namespace`.
    pub namespace: &'a str,
    /// `metadata.name`, and the service account.
    pub name: &'a str,
    /// `spec.uid`, of what stands for a pod.
    pub uid: Option<&'a str>,
    /// `spec.node`.
    pub node: &'a str,
    /// `spec.addresses`.
    pub addresses: &'a [String],
    /// Labels beside `nodemesh.io/enroll`.
    pub labels: &'a [(String, String)],
    /// Set on the workload only where it differs from its namespace.
    pub enrolment: Option<Enrolment>,
}

/// A Workload; its service account has its name.
pub fn workload(w: &WorkloadManifest<'_>) -> String {
    let mut labels: String = w.labels.iter().map(|(key, value)| format!("    {key}: {value}\n")).collect();
    if let Some(enrolment) = w.enrolment {
        labels += &format!("    nodemesh.io/enroll: \"{}\"\n", enrolment.label());
    }
    let addresses: String = w.addresses.iter().map(|address| format!("    - \"{address}\"\n")).collect();
    let uid = w.uid.map(|uid| format!("  uid: {uid}\n")).unwrap_or_default();
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata:\n  namespace: {}\n  name: {}\n  labels:\n{labels}spec:\n{uid}  node: {}\n  serviceAccount: {}\n  addresses:\n{addresses}",
        w.namespace, w.name, w.node, w.name
    )
}

/// A Service over the workloads with the label `app: APP`.
pub fn service(
    namespace: &str,
    name: &str,
    app: &str,
    addresses: &[String],
    port: u16,
    target: u16,
) -> String {
    let list: String = addresses.iter().map(|address| format!("    - \"{address}\"\n")).collect();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  namespace: {namespace}\n  name: {name}\nspec:\n  clusterIP: \"{}\"\n  clusterIPs:\n{list}  selector:\n    app: {app}\n  ports:\n    - name: tcp\n      port: {port}\n      targetPort: {target}\n",
        addresses[0]
    )
}
