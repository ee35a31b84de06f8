//! Compiles the wire contract (`proto/nodemesh.proto`) with a protobuf compiler written in Rust, so that no `protoc`
//! has to be on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["nodemesh.proto"], ["proto"])?;
    prost_build::Config::new().btree_map(["."]).skip_protoc_run().compile_fds(descriptors)?;
    Ok(())
}
