//! What a virtual machine boots into: kernel modules, programs under test, tests, the programs that worlds call with
//! their libraries, and a script that runs the tests one after another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use super::{Test, cpio::Cpio, packages::Unpacked, program};
use crate::{
    elf,
    run::{clean, read},
};

/// Modules that worlds and agent need; what they depend on comes along. What a kernel has built in is no file of it.
const MODULES: [&str; 27] = [
    "veth",
    "macvlan",
    "bridge",
    "br_netfilter",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "nf_conntrack",
    "nf_tables",
    "nft_compat",
    "nft_ct",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "nft_reject_inet",
    "x_tables",
    "xt_conntrack",
    "xt_tcpudp",
    "xt_comment",
    "xt_mark",
    "ipt_REJECT",
    "ip6t_REJECT",
    "nfnetlink",
    "nf_defrag_ipv6",
    "crc32c_generic",
    "crc32c-intel",
    "libcrc32c",
];

/// Programs of the host that worlds call. The shell too: busybox's runs its own `ip` whatever `PATH` says.
const HOST_PROGRAMS: [&str; 4] = ["ip", "ss", "tc", "sh"];
/// Names under which worlds call iptables.
const IPTABLES: [&str; 4] = ["iptables", "ip6tables", "iptables-save", "ip6tables-save"];

/// How much slower than a real machine the emulated one is taken to be; see `wait::scaled` of the tests.
const TIME_SCALE: u32 = 8;
/// Open files that a process may have: more than the kernel gives the first one, which tests with thousands of
/// connections need.
const OPEN_FILES: u32 = 65_536;

const DIRECTORIES: [&str; 20] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "lib64",
    "lib/modules",
    "mesh",
    "mesh/bin",
    "mesh/tests",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/lib",
    "usr/sbin",
    "var",
];

/// Writes the archive.
pub(super) fn write(
    archive: &Path,
    kernel: &Unpacked,
    binaries: &Path,
    executables: &[(String, PathBuf)],
    tests: &[Test],
) -> Result<()> {
    let mut cpio = Cpio::create(archive)?;
    let mut made: BTreeSet<String> = DIRECTORIES.iter().map(|name| (*name).to_owned()).collect();
    for directory in DIRECTORIES {
        cpio.directory(directory)?;
    }
    cpio.device("dev/console", 5, 1)?;
    cpio.device("dev/null", 1, 3)?;

    let modules = closure(&kernel.modules)?;
    for (name, content) in &modules {
        cpio.file(&format!("lib/modules/{name}.ko"), content)?;
    }

    let mut dynamic: Vec<(String, PathBuf)> = vec![];
    for name in HOST_PROGRAMS {
        dynamic.push((format!("usr/sbin/{name}"), program(name)?));
    }
    let iptables = program("iptables")?;
    dynamic.push(("usr/sbin/xtables-multi".into(), iptables));
    for name in ["mesh-agent", "mesh-controller", "meshctl"] {
        dynamic.push((format!("mesh/bin/{name}"), binaries.join(name)));
    }
    let used: BTreeSet<&str> = tests.iter().map(|test| test.program.as_str()).collect();
    for (name, path) in executables.iter().filter(|(name, _)| used.contains(name.as_str())) {
        dynamic.push((format!("mesh/tests/{name}"), path.clone()));
    }
    let mut libraries = BTreeSet::new();
    for (inside, path) in &dynamic {
        libraries.extend(elf::needed(path)?);
        cpio.file(inside, &elf::stripped(path)?)?;
    }
    let extensions =
        read(clean("find").args(["/usr/lib", "/lib", "-path", "*/xtables/lib*.so", "-type", "f"]))?;
    for extension in extensions.lines().map(PathBuf::from) {
        libraries.extend(elf::needed(&extension)?);
        libraries.insert(extension);
    }
    for library in libraries {
        let inside = library.to_string_lossy().trim_start_matches('/').to_owned();
        directories(&mut cpio, &mut made, &inside)?;
        cpio.file(&inside, &fs::read(&library)?)?;
    }
    for name in IPTABLES {
        cpio.link(&format!("usr/sbin/{name}"), "xtables-multi")?;
    }
    cpio.file("bin/busybox", &fs::read(program("busybox")?)?)?;
    cpio.link("bin/sh", "busybox")?;
    cpio.file("init", script(modules.iter().map(|(name, _)| name.as_str()), tests).as_bytes())?;
    cpio.finish()?;
    Ok(())
}

/// The directories above a file that are not there yet.
fn directories(cpio: &mut Cpio, made: &mut BTreeSet<String>, file: &str) -> Result<()> {
    let above: Vec<&Path> = Path::new(file).ancestors().skip(1).collect();
    for directory in above.into_iter().rev().map(|path| path.to_string_lossy().into_owned()) {
        if !directory.is_empty() && made.insert(directory.clone()) {
            cpio.directory(&directory)?;
        }
    }
    Ok(())
}

/// The modules and all that they depend on, in the order in which they can be loaded.
fn closure(modules: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let listed = read(clean("find").arg(modules).args(["-name", "*.ko*", "-type", "f"]))?;
    let files: BTreeMap<String, &str> = listed.lines().map(|path| (module_name(path), path)).collect();
    let mut loaded: Vec<(String, Vec<u8>)> = vec![];
    for name in MODULES {
        add(&name.replace('-', "_"), &files, &mut loaded)?;
    }
    for needed in ["veth", "sch_ingress", "cls_bpf", "nf_tables"] {
        ensure!(
            loaded.iter().any(|(name, _)| name == needed),
            "this kernel's package has no module {needed}"
        );
    }
    Ok(loaded)
}

fn add(name: &str, files: &BTreeMap<String, &str>, loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if loaded.iter().any(|(there, _)| there == name) {
        return Ok(());
    }
    // Built in, or not in this kernel at all, which the tests would tell.
    let Some(path) = files.get(name) else { return Ok(()) };
    let content = if path.ends_with(".xz") {
        let output = clean("xz").args(["--decompress", "--stdout", path]).output()?;
        ensure!(output.status.success(), "cannot unpack {path}");
        output.stdout
    } else if path.ends_with(".ko") {
        fs::read(path).with_context(|| format!("reading {path}"))?
    } else {
        bail!("{path} is compressed in a way that is not known here");
    };
    for dependency in dependencies(&content) {
        add(&dependency, files, loaded)?;
    }
    loaded.push((name.to_owned(), content));
    Ok(())
}

/// `…/crc32c-intel.ko.xz` → `crc32c_intel`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// What a module says that it depends on: `depends=a,b` among the texts of its section `.modinfo`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return vec![] };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(value);
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// The first process. Results go to the second serial line, everything else to the first.
fn script<'a>(modules: impl Iterator<Item = &'a str>, tests: &[Test]) -> String {
    let load: String =
        modules.map(|name| format!("insmod /lib/modules/{name}.ko || echo \"no {name}\"\n")).collect();
    let run: String =
        tests.iter().map(|test| format!("run {} {} {}\n", test.program, test.name, test.seconds())).collect();
    format!(
        r#"#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
{load}
ulimit -n {OPEN_FILES}
export NODEMESH_BIN_DIR=/mesh/bin NODEMESH_TIME_SCALE={TIME_SCALE} RUST_BACKTRACE=0
exec 3>/dev/ttyS1
stty -F /dev/ttyS1 raw
run() {{
    echo "start $1 $2" >&3
    if timeout -s KILL $3 /mesh/tests/$1 --exact $2 --nocapture --test-threads=1 >/tmp/out 2>&1; then
        echo "passed $1 $2" >&3
    else
        tail -n 400 /tmp/out | sed 's/^/out /' >&3
        echo "failed $1 $2" >&3
    fi
}}
{run}
echo "done" >&3
sync
sleep 1
poweroff -f
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_say_what_they_depend_on() {
        let text = b"license=GPL\0depends=nf_conntrack,nf-defrag-ipv6\0intree=Y\0";
        assert_eq!(dependencies(text), ["nf_conntrack", "nf_defrag_ipv6"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
        assert_eq!(module_name("/a/crc32c-intel.ko.xz"), "crc32c_intel");
    }
}
