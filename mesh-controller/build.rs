//! Generates the services of the wire contract; its messages are mesh-core's, generated once there.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../mesh-core/proto");
    let descriptors = protox::compile(["nodemesh.proto"], ["../mesh-core/proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .extern_path(".nodemesh.v1", "::mesh_core::wire::proto")
        .compile_fds(descriptors)?;
    Ok(())
}
