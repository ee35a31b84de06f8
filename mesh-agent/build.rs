//! Generates the clients of the controller's services from the wire contract, and embeds the kernel programs.
//!
//! The messages themselves are mesh-core's. The services' server side goes to a file of its own, which only the
//! tests' controller includes.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

const PROTO_DIR: &str = "../mesh-core/proto";
/// Names the kernel programs' object when it is not in its usual place.
const OBJECT_VARIABLE: &str = "NODEMESH_EBPF_OBJECT";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    generate_services(&out)?;
    embed_kernel_programs(&out)?;
    Ok(())
}

fn generate_services(out: &Path) -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={PROTO_DIR}");
    let services = protox::compile(["nodemesh.proto"], [PROTO_DIR])?;
    let generator = || {
        tonic_prost_build::configure()
            .extern_path(".nodemesh.v1", "::mesh_core::wire::proto")
            .skip_protoc_run()
    };
    generator().build_server(false).build_transport(false).out_dir(out).compile_fds(services.clone())?;
    let for_tests = out.join("server");
    fs::create_dir_all(&for_tests)?;
    generator().build_client(false).out_dir(for_tests).compile_fds(services)?;
    Ok(())
}

/// Copies the object that `cargo xtask build-ebpf` made; an empty file stands for none, and the agent says so at
/// its start.
fn embed_kernel_programs(out: &Path) -> io::Result<()> {
    println!("cargo:rerun-if-env-changed={OBJECT_VARIABLE}");
    let object = match env::var_os(OBJECT_VARIABLE) {
        Some(path) => PathBuf::from(path),
        // Cargo's own target directory may be elsewhere; the object's place is fixed.
        None => PathBuf::from("../target/mesh-ebpf/mesh-ebpf.o"),
    };
    let embedded = out.join("mesh-ebpf.o");
    if object.exists() {
        println!("cargo:rerun-if-changed={}", object.display());
        fs::write(embedded, fs::read(object)?)
    } else {
        watch_for(&object);
        fs::write(embedded, [])
    }
}

/// Has this script run again once the object appears. Cargo takes a missing file for one that always changed, so
/// its folder is watched instead, where one can be made.
fn watch_for(object: &Path) {
    let watched = match object.parent() {
        Some(folder) if fs::create_dir_all(folder).is_ok() => folder,
        _ => object,
    };
    println!("cargo:rerun-if-changed={}", watched.display());
}
