//! An OCI image, made from files without a builder: one layer, its configuration and its manifest, in the layout that
//! containerd, podman and Docker read (image-spec 1.1, image-layout). The same files always make the same bytes.

use std::{collections::BTreeMap, fs, io::Write, path::Path};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// Who owns what a container without root writes.
pub(crate) const NOBODY: u32 = 65532;
/// `/etc/passwd`.
pub(crate) const NAMES: &str =
    "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n";

/// An image in the making.
#[derive(Debug)]
pub(crate) struct Image {
    name: String,
    entrypoint: Vec<String>,
    user: u32,
    labels: BTreeMap<String, String>,
    /// By path without the first slash; parents come before what is in them.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Directory { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { target: String },
}

impl Image {
    /// One without files, by `REGISTRY/NAME:TAG`, that runs as root.
    pub(crate) fn new(name: &str, entrypoint: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            entrypoint: entrypoint.iter().map(|word| (*word).to_owned()).collect(),
            user: 0,
            labels: BTreeMap::new(),
            entries: BTreeMap::new(),
        }
    }

    pub(crate) fn user(mut self, user: u32) -> Self {
        self.user = user;
        self
    }

    /// A label `org.opencontainers.image.KEY`.
    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(format!("org.opencontainers.image.{key}"), value.to_owned());
        self
    }

    pub(crate) fn file(self, path: &str, mode: u32, content: Vec<u8>) -> Self {
        self.entry(path, Entry::File { mode, content })
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        self.entry(path, Entry::Link { target: target.to_owned() })
    }

    pub(crate) fn directory(self, path: &str, mode: u32) -> Self {
        self.entry(path, Entry::Directory { mode })
    }

    /// With the directories above it.
    fn entry(mut self, path: &str, entry: Entry) -> Self {
        let path = path.trim_matches('/');
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
        self.entries.insert(path.to_owned(), entry);
        self
    }

    /// Writes the archive.
    pub(crate) fn write(&self, archive: &Path) -> Result<()> {
        let layer = self.layer()?;
        let mut packed = GzBuilder::new().write(vec![], Compression::default());
        packed.write_all(&layer)?;
        let packed = packed.finish()?;
        let config = serde_json::to_vec(&self.config(&digest(&layer)))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
        }))?;
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        let tag = self.name.rsplit(':').next().unwrap_or_default();
        entry["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag});
        entry["platform"] = json!({"architecture": architecture(), "os": "linux"});
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        });

        // A file with the archive's name is whole.
        let unfinished = archive.with_extension("unfinished");
        let file =
            fs::File::create(&unfinished).with_context(|| format!("making {}", unfinished.display()))?;
        let mut tar = Builder::new(std::io::BufWriter::new(file));
        put(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        put(&mut tar, "index.json", &serde_json::to_vec(&index)?)?;
        for blob in [&config, &packed, &manifest] {
            put(&mut tar, &format!("blobs/sha256/{}", digest(blob)), blob)?;
        }
        tar.into_inner()?.flush()?;
        fs::rename(&unfinished, archive)?;
        Ok(())
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = Builder::new(vec![]);
        for (path, entry) in &self.entries {
            match entry {
                Entry::Directory { mode } => {
                    tar.append_data(
                        &mut header(EntryType::Directory, *mode, 0),
                        format!("{path}/"),
                        &[][..],
                    )?;
                }
                Entry::File { mode, content } => {
                    let size = content.len() as u64;
                    tar.append_data(&mut header(EntryType::Regular, *mode, size), path, &content[..])?;
                }
                Entry::Link { target } => {
                    tar.append_link(&mut header(EntryType::Symlink, 0o777, 0), path, target)?;
                }
            }
        }
        Ok(tar.into_inner()?)
    }

    fn config(&self, layer: &str) -> Value {
        json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "User": format!("{0}:{0}", self.user),
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/bin:/bin"],
                "Labels": self.labels,
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
            "history": [{"created_by": "cargo xtask image"}],
        })
    }
}

/// As Go, and so every image, calls this machine's processor.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn put(tar: &mut Builder<impl Write>, path: &str, content: &[u8]) -> Result<()> {
    tar.append_data(&mut header(EntryType::Regular, 0o644, content.len() as u64), path, content)?;
    Ok(())
}

fn descriptor(kind: &str, content: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": format!("sha256:{}", digest(content)), "size": content.len()})
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// The archive's files.
    fn written(image: &Image) -> BTreeMap<String, Vec<u8>> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("image.tar");
        image.write(&path).expect("an archive");
        let mut archive = tar::Archive::new(fs::File::open(&path).expect("the archive"));
        let mut files = BTreeMap::new();
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a path").to_string_lossy().into_owned();
            let mut content = vec![];
            entry.read_to_end(&mut content).expect("its content");
            files.insert(name, content);
        }
        files
    }

    fn image() -> Image {
        Image::new("nodemesh.local/it:1", &["/usr/bin/it"])
            .user(NOBODY)
            .label("title", "it")
            .file("usr/bin/it", 0o755, b"program".to_vec())
            .link("bin/it", "/usr/bin/it")
            .directory("tmp", 0o1777)
    }

    #[test]
    fn every_blob_is_found_by_the_digest_that_refers_to_it() {
        let files = written(&image());
        let index: Value = serde_json::from_slice(&files["index.json"]).expect("an index");
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "nodemesh.local/it:1");
        let blob = |descriptor: &Value| -> Vec<u8> {
            let digest = descriptor["digest"].as_str().expect("a digest").trim_start_matches("sha256:");
            let content = files[&format!("blobs/sha256/{digest}")].clone();
            assert_eq!(super::digest(&content), digest);
            assert_eq!(descriptor["size"], content.len());
            content
        };
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).expect("a manifest");
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).expect("a configuration");
        assert_eq!(config["config"]["User"], "65532:65532");
        assert_eq!(config["config"]["Labels"]["org.opencontainers.image.title"], "it");
        let mut layer = vec![];
        flate2::read::GzDecoder::new(&blob(&manifest["layers"][0])[..])
            .read_to_end(&mut layer)
            .expect("a layer");
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{}", super::digest(&layer)));
        let mut layer = tar::Archive::new(&layer[..]);
        let paths = layer.entries().expect("entries").map(|entry| {
            let entry = entry.expect("an entry");
            (
                entry.path().expect("a path").to_string_lossy().into_owned(),
                entry.header().mode().expect("a mode"),
            )
        });
        let wanted = [
            ("bin/", 0o755),
            ("bin/it", 0o777),
            ("tmp/", 0o1777),
            ("usr/", 0o755),
            ("usr/bin/", 0o755),
            ("usr/bin/it", 0o755),
        ];
        assert_eq!(paths.collect::<Vec<_>>(), wanted.map(|(path, mode)| (path.to_owned(), mode)));
    }

    #[test]
    fn the_same_files_make_the_same_bytes() {
        assert_eq!(written(&image()), written(&image()));
    }
}
