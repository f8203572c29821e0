//! A small HTTP/1.1 server for one page. It bounds what a client may send, how long it may take and how many clients there
//! are, so slow clients keep others from the metrics for no longer than [`REQUEST_TIMEOUT`] and [`PAGE_TIMEOUT`] together,
//! 10 s, and the collection of the metrics.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtioblkd::internal::base::logging;

use super::text::Format;

/// How long a client may take to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may then take to read the whole page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// The most clients at a time. Others get 503.
const MAX_CLIENTS: usize = 8;
/// The longest head of a request in bytes.
const MAX_HEAD: usize = 16 << 10;
/// How long to wait when no descriptor or thread is left.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// What `/` shows.
const INDEX: &str =
    "<html><head><title>virtioblkctl exporter</title></head><body><a href=\"/metrics\">Metrics</a></body></html>\n";

/// Makes the page in a format. `Err`: why there is none.
pub(super) type Collect<'a> = dyn Fn(Format) -> Result<String, String> + Sync + 'a;

/// Serves for ever.
pub(super) fn serve(listener: &TcpListener, collect: &Collect) {
    let clients = AtomicUsize::new(0);
    thread::scope(|scope| {
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    if error.kind() != ErrorKind::ConnectionAborted {
                        logging::message(format_args!("cannot accept a connection: {error}"));
                        thread::sleep(RETRY_DELAY);
                    }
                    continue;
                }
            };
            if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
                clients.fetch_sub(1, Ordering::Relaxed);
                refuse(&stream);
                continue;
            }
            let clients = &clients;
            let spawned = thread::Builder::new().spawn_scoped(scope, move || {
                // A client that has left gets no reply.
                let _ = answer(stream, collect);
                clients.fetch_sub(1, Ordering::Relaxed);
            });
            if spawned.is_err() {
                clients.fetch_sub(1, Ordering::Relaxed);
                thread::sleep(RETRY_DELAY);
            }
        }
    });
}

/// Refuses a client without waiting for it.
fn refuse(stream: &TcpStream) {
    let reply = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let _ = stream.set_nonblocking(true).and_then(|()| (&*stream).write_all(reply.as_bytes()));
}

fn answer(mut stream: TcpStream, collect: &Collect) -> std::io::Result<()> {
    let head = head(&mut stream)?;
    let (status, content_type, body) = reply(&head, collect);
    let length = body.len();
    let mut text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    if !head.starts_with("HEAD ") {
        text.push_str(&body);
    }
    send(&mut stream, text.as_bytes(), PAGE_TIMEOUT)
}

/// Sends all of the bytes. A client that reads a few now and then does not get more time.
fn send(stream: &mut TcpStream, mut rest: &[u8], timeout: Duration) -> std::io::Result<()> {
    let end = Instant::now() + timeout;
    while !rest.is_empty() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(sent) => rest = &rest[sent..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads a request up to the empty line.
fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let end = Instant::now() + REQUEST_TIMEOUT;
    let mut head = Vec::new();
    let mut buffer = [0; 2048];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_HEAD {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => head.extend_from_slice(&buffer[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// PURE. The status, the type and the body of the reply to a request.
fn reply(head: &str, collect: &Collect) -> (&'static str, &'static str, String) {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !words.next().is_some_and(|version| version.starts_with("HTTP/1.")) {
        return ("400 Bad Request", PLAIN, "this is no HTTP/1.1 request\n".into());
    }
    if !["GET", "HEAD"].contains(&method) {
        return ("405 Method Not Allowed", PLAIN, "only GET and HEAD are allowed\n".into());
    }
    match target.split('?').next() {
        Some("/") => ("200 OK", "text/html; charset=utf-8", INDEX.into()),
        Some("/metrics") => {
            let format = if accepts_openmetrics(head) { Format::OpenMetrics } else { Format::Prometheus };
            match collect(format) {
                Ok(page) => ("200 OK", format.content_type(), page),
                Err(why) => ("500 Internal Server Error", PLAIN, format!("{why}\n")),
            }
        }
        _ => ("404 Not Found", PLAIN, "the metrics are at /metrics\n".into()),
    }
}

fn accepts_openmetrics(head: &str) -> bool {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    let mut accepted = fields.filter(|(name, _)| name.eq_ignore_ascii_case("accept"));
    accepted.any(|(_, value)| value.contains("application/openmetrics-text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_reads_slowly_or_not_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for reads in [false, true] {
            let mut client = TcpStream::connect(address).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let reader = thread::spawn(move || {
                // Until the server hangs up.
                while reads && client.read(&mut [0; 1000]).is_ok_and(|count| count > 0) {
                    thread::sleep(Duration::from_millis(5));
                }
                client
            });
            let page = vec![b'x'; 64 << 20];
            let error = send(&mut stream, &page, Duration::from_millis(300)).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
            // What was sent already takes the slow reader long.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            drop(stream);
            if !reads {
                reader.join().unwrap();
            }
        }
    }

    #[test]
    fn each_request_gets_its_reply() {
        let collect = |format| match format {
            Format::OpenMetrics => Ok("open".to_owned()),
            Format::Prometheus => Err("none".to_owned()),
        };
        let ask = |head: &str| reply(head, &collect);
        let open =
            ask("GET /metrics?x=1 HTTP/1.1\r\naccept: text/plain, application/openmetrics-text;version=1.0.0\r\n\r\n");
        assert_eq!((open.0, open.2.as_str()), ("200 OK", "open"));
        assert!(open.1.starts_with("application/openmetrics-text"));
        assert!(ask("GET /metrics HTTP/1.1\r\n\r\n").0.starts_with("500"));
        assert!(ask("GET / HTTP/1.0\r\n\r\n").2.contains("/metrics"));
        assert!(ask("GET /other HTTP/1.1\r\n\r\n").0.starts_with("404"));
        assert!(ask("POST /metrics HTTP/1.1\r\n\r\n").0.starts_with("405"));
        for wrong in ["", "GET", "GET /metrics", "\u{0}\u{ff} x y", "GET /metrics SSH-2.0"] {
            assert!(ask(wrong).0.starts_with("400"), "{wrong}");
        }
    }
}
