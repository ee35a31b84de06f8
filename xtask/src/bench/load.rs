//! Loads, by programs that others know too, and what those say of them.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Workload, process::Program, wait};

use super::systems::{HTTP, HTTP2, IPERF, SINK};

/// How long a program may take until it listens.
pub(super) const STARTED: Duration = Duration::from_secs(10);
/// What the HTTP server answers: about a hundred bytes.
const ANSWER: &str =
    "hello from the server pod, in a body of about one hundred bytes, as small answers of services are ....";
/// A file for downloads that stall: more than all buffers on the way.
const LARGE: u64 = 64 << 20;

/// Buffers are full when less than this passes...
const QUIET_BYTES: u64 = 64 << 10;
/// ...for so long: more than the longest delay of an acknowledgement.
const QUIET_TIME: Duration = Duration::from_millis(300);

/// What iperf3 saw.
#[derive(Debug)]
pub(super) struct Bulk {
    pub(super) gigabits_per_second: f64,
    pub(super) gigabytes: f64,
}

/// What wrk saw.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) per_second: f64,
    pub(super) count: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    /// Requests that were answered by an error, and connections that broke.
    pub(super) failed: f64,
}

/// The server pod's programs: nginx and iperf3.
pub(super) fn applications(server: &Workload, directory: &Path) -> Result<Vec<Program>> {
    let root = directory.join("www");
    fs::create_dir_all(&root)?;
    fs::File::create(root.join("large"))?.set_len(LARGE)?;
    let config = directory.join("server.conf");
    let own = directory.display();
    fs::write(
        &config,
        format!(
            "user root; worker_processes 1; daemon off; pid {own}/server.pid; error_log {own}/server.err;
events {{ worker_connections 9000; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 1d;
  server {{
    listen {HTTP} backlog=8192; root {}; send_timeout 3600s;
    location / {{ return 200 \"{ANSWER}\\n\"; }}
    location /large {{ }}
  }}
  server {{
    listen {HTTP2} http2 backlog=8192; http2_max_requests 1000000000; http2_idle_timeout 1d;
    location / {{ return 200 \"{ANSWER}\\n\"; }}
  }}
}}
",
            root.display()
        ),
    )?;
    let start = |name: &str, arguments: &[&str]| {
        Program::start(name, server.command(name).args(arguments), &directory.join(format!("{name}.log")))
    };
    let nginx = start("nginx", &["-c", config.to_str().context("a path in UTF-8")?])?;
    let iperf = start("iperf3", &["-s", "-p", &IPERF.to_string()])?;
    for port in [HTTP, HTTP2, IPERF] {
        await_listener(server, port)?;
    }
    Ok(vec![nginx, iperf])
}

/// Returns once something listens there.
pub(super) fn await_listener(workload: &Workload, port: u16) -> Result<()> {
    wait::try_until(STARTED, || {
        let line = format!("ss -Hltn sport = :{port}");
        let listening = workload.shell(&line).map_err(|e| format!("{e:#}"))?;
        wait::holds(!listening.is_empty(), || format!("nothing listens on {port} in {}", workload.name))
    })
    .map_err(anyhow::Error::msg)
}

/// iperf3 from the client to the server.
pub(super) fn bulk(client: &Workload, server: &Workload, streams: u32, duration: Duration) -> Result<Bulk> {
    let mut iperf = client.command("iperf3");
    iperf.args(["-J", "-c", &server.address.v4.to_string(), "-p", &IPERF.to_string()]);
    iperf.args(["-t", &duration.as_secs().to_string(), "-P", &streams.to_string()]);
    let said: serde_json::Value =
        serde_json::from_str(&output(&mut iperf)?).context("reading iperf3's report")?;
    let sum = &said["end"]["sum_received"];
    let number =
        |name: &str| sum[name].as_f64().with_context(|| format!("iperf3 says no {name}: {}", said["error"]));
    Ok(Bulk { gigabits_per_second: number("bits_per_second")? / 1e9, gigabytes: number("bytes")? / 1e9 })
}

/// wrk from the client: small requests on so many connections, or each on a connection of its own. None may fail.
pub(super) fn requests(
    client: &Workload,
    to: SocketAddr,
    connections: u32,
    keep: Keep,
    duration: Duration,
) -> Result<Requests> {
    let said = some_requests(client, to, connections, keep, duration)?;
    ensure!(said.failed == 0.0, "{} of {} requests failed, to {to}", said.failed, said.count);
    Ok(said)
}

/// The same, of which some may fail.
pub(super) fn some_requests(
    client: &Workload,
    to: SocketAddr,
    connections: u32,
    keep: Keep,
    duration: Duration,
) -> Result<Requests> {
    let mut wrk = client.command("wrk");
    wrk.args(["-t1", "--latency"]).arg(format!("-c{connections}")).arg(format!("-d{}s", duration.as_secs()));
    if keep == Keep::Close {
        wrk.args(["-H", "Connection: close"]);
    }
    let said = output(wrk.arg(format!("http://{to}/")))?;
    parse_wrk(&said).with_context(|| format!("wrk says something else than expected:\n{said}"))
}

/// Whether connections are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    Alive,
    Close,
}

/// What h2load saw.
#[derive(Debug)]
pub(super) struct Streams {
    pub(super) per_second: f64,
    pub(super) count: f64,
}

/// h2load from the client: small requests by HTTP/2 with prior knowledge, 16 at once on each of 8 connections.
pub(super) fn streams(client: &Workload, to: SocketAddr, duration: Duration) -> Result<Streams> {
    let mut h2load = client.command("h2load");
    h2load.args(["-t1", "-c8", "-m16", "-D"]).arg(duration.as_secs().to_string());
    let said = output(h2load.arg(format!("http://{to}/")))?;
    parse_h2load(&said).with_context(|| format!("h2load says something else than expected:\n{said}"))
}

/// `finished in 3.00s, 71234.33 req/s, 1.02MB/s` and `requests: 213703 total, …, 213703 succeeded, 0 failed, 0 errored, …`.
/// At the end of its time it gives up what is under way, without a word; what failed before is none of ours to measure.
fn parse_h2load(said: &str) -> Option<Streams> {
    let line = |begin: &str| said.lines().find_map(|line| line.strip_prefix(begin));
    let rate = line("finished in ")?.split(", ").find_map(|part| part.strip_suffix(" req/s"))?;
    let number = |what: &str| {
        line("requests: ")?.split(", ").find_map(|part| part.strip_suffix(what))?.trim().parse::<f64>().ok()
    };
    let failed = number(" failed")? + number(" errored")?;
    (failed == 0.0).then_some(Streams { per_second: rate.parse().ok()?, count: number(" succeeded")? })
}

/// `Socket errors: connect 0, read 1, write 0, timeout 2` and `Non-2xx or 3xx responses: 3` are there if something failed.
fn parse_wrk(said: &str) -> Option<Requests> {
    let lines = || said.lines().map(str::trim);
    let line = |begin: &str| lines().find_map(|line| line.strip_prefix(begin));
    let broken = line("Socket errors: ").map_or(Some(0.0), |kinds| {
        kinds.split(", ").map(|kind| kind.split_once(' ')?.1.parse::<f64>().ok()).sum()
    })?;
    let errors = line("Non-2xx or 3xx responses: ").map_or(Some(0.0), |count| count.parse().ok())?;
    let latency = |percent: &str| {
        let text = lines().find_map(|line| line.strip_prefix(percent))?.trim();
        let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
        let scale = match unit {
            "us" => 1.0,
            "ms" => 1e3,
            "s" => 1e6,
            _ => return None,
        };
        Some(number.parse::<f64>().ok()? * scale)
    };
    Some(Requests {
        per_second: lines().find_map(|line| line.strip_prefix("Requests/sec:"))?.trim().parse().ok()?,
        count: lines().find_map(|line| line.split_once(" requests in "))?.0.parse().ok()?,
        p50_us: latency("50%")?,
        p99_us: latency("99%")?,
        failed: broken + errors,
    })
}

/// Connections that have carried one request and now wait.
pub(super) fn idle(client: &Workload, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let request = format!("GET / HTTP/1.1\r\nHost: {to}\r\n\r\n");
    let open = |n| -> Result<TcpStream> {
        let mut stream = client.connect(to).with_context(|| format!("connection {n} of {count}"))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = [0; 4096];
        ensure!(stream.read(&mut answer)? > 0, "connection {n} of {count} was closed");
        Ok(stream)
    };
    (1..=count).map(open).collect()
}

/// Connections that are stalled: half of them downloads that nobody reads, half uploads.
pub(super) fn stalled(client: &Workload, server: &Workload, count: usize) -> Result<Vec<TcpStream>> {
    let half = count / 2;
    let mut all = vec![];
    for _ in 0..half {
        let mut download = client.connect(server.v4(HTTP))?;
        download.write_all(b"GET /large HTTP/1.1\r\nHost: large\r\n\r\n")?;
        all.push(download);
        let mut upload = client.connect(server.v4(SINK))?;
        upload.set_nonblocking(true)?;
        // Full once nothing more is taken between two looks: the buffers on the way are full too then.
        let filled = wait::try_until(STARTED, || match fill(&mut upload) {
            Ok(0) => Ok(()),
            Ok(_) => Err("still taking bytes".to_owned()),
            Err(error) => Err(error.to_string()),
        });
        filled.map_err(anyhow::Error::msg)?;
        all.push(upload);
    }
    quiet(&[client, server])?;
    Ok(all)
}

/// Waits until hardly a byte passes: whatever has buffers on the way has filled them.
fn quiet(workloads: &[&Workload]) -> Result<()> {
    let (mut seen, mut since) = (u64::MAX, Instant::now());
    let still = wait::try_until(STARTED, || {
        let passed = workloads.iter().map(|it| passed(it)).sum::<Result<u64>>().map_err(|e| e.to_string())?;
        // Probes of closed windows go on.
        if passed.abs_diff(seen) > QUIET_BYTES {
            (seen, since) = (passed, Instant::now());
        }
        wait::holds(since.elapsed() >= QUIET_TIME, || "buffers still fill".into())
    });
    still.map_err(anyhow::Error::msg)
}

/// Bytes that all interfaces of a namespace have received and sent.
fn passed(workload: &Workload) -> Result<u64> {
    // Two lines of heads; then a line an interface: its name, eight numbers of what came in, eight of what went out.
    let counters = workload.shell("cat /proc/net/dev")?;
    let bytes = |line: &str| -> Option<u64> {
        let numbers: Vec<u64> =
            line.split_once(':')?.1.split_whitespace().map_while(|it| it.parse().ok()).collect();
        Some(numbers.first()? + numbers.get(8)?)
    };
    counters.lines().skip(2).map(bytes).sum::<Option<u64>>().context("/proc/net/dev has another form")
}

/// Writes what is taken at once; how much that was.
fn fill(upload: &mut TcpStream) -> std::io::Result<usize> {
    let mut written = 0;
    loop {
        match upload.write(&[0; 1 << 16]) {
            Ok(n) => written += n,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(written),
            Err(error) => return Err(error),
        }
    }
}

/// Takes connections and reads nothing: they stay in the listener's queue.
#[derive(Debug)]
pub(super) struct Sink {
    _listener: TcpListener,
}

impl Sink {
    pub(super) fn start(server: &Workload) -> Result<Self> {
        Ok(Self { _listener: server.listen(server.address.v4.into(), SINK)? })
    }
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}\n{said}{complained}", output.status);
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_understood() {
        let said = "Running 4s test @ http://10.91.2.2:8080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.35ms  401.00us  14.83ms   84.31%
  Latency Distribution
     50%    1.31ms
     75%    1.50ms
     90%  890.00us
     99%    2.51ms
  189332 requests in 4.00s, 47.12MB read
Requests/sec:  47331.05
Transfer/sec:     11.78MB
";
        let requests = parse_wrk(said).unwrap();
        assert_eq!((requests.count, requests.per_second), (189_332.0, 47_331.05));
        assert_eq!((requests.p50_us, requests.p99_us, requests.failed), (1310.0, 2510.0, 0.0));
        let errors = "\n  Socket errors: connect 0, read 1, write 0, timeout 2\n  Non-2xx or 3xx responses: 3\nRequests/sec";
        assert_eq!(parse_wrk(&said.replace("\nRequests/sec", errors)).unwrap().failed, 6.0);
        assert!(parse_wrk("unable to connect").is_none());
    }

    #[test]
    fn h2load_is_understood() {
        let said = "finished in 3.00s, 71234.33 req/s, 12.10MB/s
requests: 213703 total, 213831 started, 213703 done, 213703 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 213703 2xx, 0 3xx, 0 4xx, 0 5xx
";
        let streams = parse_h2load(said).unwrap();
        assert_eq!((streams.count, streams.per_second), (213_703.0, 71_234.33));
        assert!(parse_h2load(&said.replace(" 0 failed", " 3 failed")).is_none());
    }
}
