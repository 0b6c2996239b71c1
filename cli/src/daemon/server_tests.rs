// SPDX-License-Identifier: MIT OR Apache-2.0

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use ept_virt_core::wire::{PROTOCOL_VERSION, Status};
use proptest::prelude::*;

use super::*;

#[path = "../../../fuzz/invariants/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/invariants/message.rs"]
mod message;
#[path = "../../../fuzz/invariants/socket_message.rs"]
mod socket_message;

/// A server in a directory of its own.
struct Test {
    dir: PathBuf,
    server: Option<Server>,
    shared: Arc<Shared>,
    mailbox: Mailbox,
}

impl Test {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ept-virt-server-{}-{count}", std::process::id()));
        let server = Server::bind(&dir.join("run/sock")).unwrap();
        let shared = Arc::new(Shared::new("test:///default"));
        let mailbox = Mailbox::default();
        server.start(Arc::clone(&shared), mailbox.clone()).unwrap();
        Self { dir, server: Some(server), shared, mailbox }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("run/sock")
    }

    /// Somebody asks for a look.
    fn looks(&self) -> bool {
        let now = Instant::now();
        self.mailbox.wait(now, now + Duration::from_secs(20)).look
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Client(BufReader::new(stream))
    }
}

impl Drop for Test {
    fn drop(&mut self) {
        self.server = None;
        let _ = fs::remove_dir_all(&self.dir);
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    fn receive(&mut self) -> Reply {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let response: Response = serde_json::from_str(&line).unwrap();
        assert_eq!(response.v, PROTOCOL_VERSION);
        response.reply
    }

    fn ask(&mut self, line: &str) -> Reply {
        self.send(line.as_bytes());
        self.send(b"\n");
        self.receive()
    }

    fn ended(&mut self) -> bool {
        let mut rest = Vec::new();
        matches!(self.0.read_to_end(&mut rest), Ok(0) | Err(_))
    }
}

fn kind(reply: Reply) -> ErrorKind {
    let Reply::Error(error) = reply else { panic!("{reply:?}") };
    error.kind
}

#[test]
fn rounds_of_an_observed_domain_are_recorded() {
    use ept_virt_core::record::Reader;
    use ept_virt_core::sampler::{Harvest, MemSlot};
    use ept_virt_core::wire::DomainState;
    let test = Test::new();
    let cell = Arc::new(Cell::new("vm1", "6695eb01"));
    test.shared.insert("6695eb01-f6a4-8304-79aa-97f2502e193f", Arc::clone(&cell));
    let ask = r#"{"v":1,"cmd":"record","domain":"vm1"}"#;
    assert_eq!(kind(test.client().ask(ask)), ErrorKind::NotObserved);
    cell.update(|status| status.state = DomainState::Observing);
    let mut client = test.client();
    assert!(matches!(client.ask(ask), Reply::Done));
    assert_eq!(kind(test.client().ask(ask)), ErrorKind::NotObserved, "it is recorded already");
    // As a worker does in each round.
    let mut tap = cell.take_tap().unwrap();
    let slot = MemSlot { gfn_start: 0, page_count: 70, hva: 0, id: 0, read_only: false, dirty_log: false };
    let mut harvest = Harvest::default();
    harvest.reset(0, 70);
    harvest.accessed[1] = 0x21;
    tap.add(&slot, &harvest);
    assert!(tap.end(None));
    let mut reader = Reader::new(client.0).unwrap();
    assert_eq!((reader.header().domain.as_str(), reader.header().uuid.as_str()), ("vm1", "6695eb01"));
    assert_eq!(reader.frame().unwrap().unwrap().slots[0].accessed, [0, 0x21]);
    // The domain is let go, and the recording ends.
    drop(tap);
    assert!(reader.frame().unwrap().is_none());
}

#[test]
fn answers_line_after_line() {
    let test = Test::new();
    test.shared.insert("6695eb01-f6a4-8304-79aa-97f2502e193f", Arc::new(Cell::new("vm1", "6695eb01")));
    let mut client = test.client();
    let status = |reply: Reply| -> Status {
        let Reply::Status(status) = reply else { panic!("{reply:?}") };
        *status
    };
    let all = status(client.ask(r#"{"v":1,"cmd":"status"}"#));
    assert_eq!((all.daemon.libvirt_uri.as_str(), all.domains.len()), ("test:///default", 1));
    assert_eq!(status(client.ask(r#"{"v":1,"cmd":"status","domain":"vm1"}"#)).domains.len(), 1);
    assert_eq!(kind(client.ask(r#"{"v":1,"cmd":"status","domain":"vm2"}"#)), ErrorKind::NoDomain);
    assert_eq!(kind(client.ask(r#"{"v":1,"cmd":"map","domain":"vm1"}"#)), ErrorKind::NotObserved);
    // Several requests in one write, the last without its end.
    client.send(b"{\"v\":1,\"cmd\":\"status\"}\n{\"v\":1,\"cmd\":\"status\"}\n{\"v\":1,");
    status(client.receive());
    status(client.receive());
    client.send(b"\"cmd\":\"status\"}\n");
    status(client.receive());
}

#[test]
fn root_holds_a_domain_and_lets_it_go() {
    let test = Test::new();
    let cell = Arc::new(Cell::new("vm1", "6695eb01"));
    test.shared.insert("6695eb01-f6a4-8304-79aa-97f2502e193f", Arc::clone(&cell));
    let mut client = test.client();
    let mut ask = |verb: &str| client.ask(&format!(r#"{{"v":1,"cmd":"{verb}","domain":"vm1"}}"#));
    for (verb, held) in [("pause", Hold::Paused), ("resume", Hold::None), ("pause", Hold::Paused)] {
        assert_eq!(ask(verb), Reply::Done, "{verb}");
        assert_eq!(cell.hold(), held);
        assert!(test.looks());
    }
    // What holds already is told, and changes nothing.
    assert_eq!(kind(ask("pause")), ErrorKind::BadRequest);
    assert_eq!(kind(ask("start")), ErrorKind::BadRequest);
    assert_eq!((ask("stop"), ask("start")), (Reply::Done, Reply::Done));
    assert_eq!(cell.hold(), Hold::None);
}

#[test]
fn others_may_ask_and_not_change() {
    let shared = Shared::new("test:///default");
    shared.insert("6695eb01-f6a4-8304-79aa-97f2502e193f", Arc::new(Cell::new("vm1", "6695eb01")));
    let mailbox = Mailbox::default();
    for verb in ["start", "stop", "pause", "resume"] {
        let line = format!(r#"{{"v":1,"cmd":"{verb}","domain":"vm1"}}"#);
        assert_eq!(kind(answer(line.as_bytes(), false, &shared, &mailbox)), ErrorKind::NotPermitted);
    }
    assert!(matches!(answer(br#"{"v":1,"cmd":"status"}"#, false, &shared, &mailbox), Reply::Status(_)));
    assert_eq!(shared.find("vm1").unwrap().hold(), Hold::None);
}

#[test]
fn a_group_may_be_let_in() {
    let test = Test::new();
    let socket = test.dir.join("run/open");
    let server = Server::bind(&socket).unwrap();
    let mode = || fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    let error = server.open_to(Some("no-such-group")).unwrap_err();
    assert!(error.to_string().contains("no-such-group"), "{error}");
    assert_eq!(mode(), 0o600);
    server.open_to(Some("root")).unwrap();
    assert_eq!(mode(), 0o660);
    server.open_to(None).unwrap();
    assert_eq!(mode(), 0o600);
}

#[test]
fn a_nudge_wakes_the_daemon_and_can_not_drive_a_terminal() {
    let test = Test::new();
    let nudge = r#"{"v":1,"cmd":"nudge","op":"started","domain":"a\u001b[31m"}"#;
    assert_eq!(test.client().ask(nudge), Reply::Done);
    assert!(test.looks());
    let daemon = test.shared.status(None).daemon;
    assert_eq!((daemon.nudges, daemon.last_nudge.as_deref()), (1, Some("started a\u{fffd}[31m")));
    // As the hook does it: gone before the answer.
    test.client().send(nudge.as_bytes());
    assert!(test.looks());
}

#[test]
fn broken_input_is_answered_and_never_fatal() {
    let test = Test::new();
    let mut client = test.client();
    for line in
        ["", "nonsense", "{}", "[]", "\u{0}", r#"{"v":1,"cmd":"reboot"}"#, r#"{"v":2,"cmd":"status"}"#]
    {
        assert_eq!(kind(client.ask(line)), ErrorKind::BadRequest, "{line:?}");
    }
    client.send(b"\xff\xfe\n");
    assert_eq!(kind(client.receive()), ErrorKind::BadRequest);
    // Deeply nested, so that a naive parser would exhaust its stack.
    assert_eq!(kind(client.ask(&"[".repeat(MAX_REQUEST_BYTES / 2))), ErrorKind::BadRequest);
    let mut endless = test.client();
    endless.send(&vec![b'x'; MAX_REQUEST_BYTES + 1]);
    assert_eq!(kind(endless.receive()), ErrorKind::BadRequest);
    assert!(endless.ended());
    assert!(matches!(client.ask(r#"{"v":1,"cmd":"status"}"#), Reply::Status(_)));
}

#[test]
fn clients_are_bounded() {
    let test = Test::new();
    let mut clients: Vec<Client> = (0..MAX_CLIENTS).map(|_| test.client()).collect();
    // Each has been admitted when it is answered.
    for client in &mut clients {
        assert!(matches!(client.ask(r#"{"v":1,"cmd":"status"}"#), Reply::Status(_)));
    }
    let mut surplus = test.client();
    assert_eq!(kind(surplus.receive()), ErrorKind::Internal);
    assert!(surplus.ended());
    drop(clients);
    // Places become free as the threads notice.
    let served = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(20));
        let mut client = test.client();
        client.0.get_mut().write_all(b"{\"v\":1,\"cmd\":\"status\"}\n").is_ok()
            && matches!(client.receive(), Reply::Status(_))
    });
    assert!(served);
}

#[test]
fn the_socket_is_roots_alone_and_has_one_daemon() {
    let test = Test::new();
    let metadata = fs::metadata(test.socket()).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let second = Server::bind(&test.socket()).map(|_| ()).unwrap_err();
    assert!(second.to_string().contains("another ept-virt daemon"), "{second}");
    // The first is not disturbed by the attempt.
    assert!(matches!(test.client().ask(r#"{"v":1,"cmd":"status"}"#), Reply::Status(_)));
}

#[test]
fn a_socket_that_a_killed_daemon_left_is_replaced() {
    let mut test = Test::new();
    test.server = None;
    assert!(!test.socket().exists());
    drop(UnixListener::bind(test.socket()).unwrap());
    assert!(test.socket().exists());
    test.server = Some(Server::bind(&test.socket()).unwrap());
}

#[test]
fn what_is_no_socket_is_not_replaced() {
    let mut test = Test::new();
    test.server = None;
    fs::write(test.socket(), "precious").unwrap();
    let error = Server::bind(&test.socket()).map(drop).unwrap_err();
    let told = error.to_string();
    assert!(told.contains("cannot replace") && told.contains("--socket"), "{told}");
    assert_eq!(fs::read(test.socket()).unwrap(), b"precious");
}

#[test]
fn a_place_that_can_not_be_used_is_told() {
    let error = Server::bind(Path::new("/proc/ept-virt/sock")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("--socket"), "{error}");
}

#[test]
fn the_document_names_the_limits_that_hold() {
    let document = include_str!("../../../docs/SOCKET.md");
    let clients = format!("| {MAX_CLIENTS}, of which {KEPT_FOR_ROOT} places are kept for root |");
    assert!(document.contains(&clients));
    assert!(document.contains(&format!("| {} seconds |", CLIENT_TIMEOUT.as_secs())));
}

/// What `fuzz/` checks of the reading for hours holds of the whole answer.
fn check_answers(input: &[u8]) {
    let shared = Shared::new("test:///default");
    shared.insert("6695eb01-f6a4-8304-79aa-97f2502e193f", Arc::new(Cell::new("vm1", "6695eb01")));
    let mailbox = Mailbox::default();
    for may_change in [true, false] {
        socket_message::check(input, |line| Response::line(answer(line, may_change, &shared, &mailbox)));
    }
    let nudge = shared.facts().last_nudge.clone().unwrap_or_default();
    assert!(nudge.chars().count() <= LONGEST_NUDGE + 3 && !nudge.contains(char::is_control), "{nudge:?}");
}

#[test]
fn the_corpus_of_messages_is_answered() {
    corpus::replay("socket_message", check_answers);
}

#[test]
fn the_longest_request_is_answered() {
    for char in ["\"", "\\", "\u{1}", "\u{9b}", "é", "\u{10ffff}"] {
        for cmd in ["nudge", "map", "status", "stop"] {
            let line = |count: usize| {
                let domain = char.repeat(count);
                serde_json::json!({"v": 1, "cmd": cmd, "op": "", "domain": domain}).to_string().into_bytes()
            };
            let (least, each) = (line(0).len(), line(1).len() - line(0).len());
            let longest = line((MAX_REQUEST_BYTES - least) / each);
            assert!(longest.len() > MAX_REQUEST_BYTES - each && longest.len() <= MAX_REQUEST_BYTES);
            check_answers(&longest);
        }
    }
}

proptest! {
    #[test]
    fn any_request_is_answered_in_one_line(
        cmd in "(status|map|start|stop|pause|resume|nudge|reboot|.{0,3})",
        domain in prop_oneof![Just("vm1".to_owned()), Just("6695EB01-F6A4-8304-79AA-97F2502E193F".to_owned()), any::<String>()],
        op: Option<String>, end in "(\n|\r\n| |x|)",
    ) {
        let line = serde_json::json!({"v": 1, "cmd": cmd, "domain": domain, "op": op}).to_string() + &end;
        check_answers(line.as_bytes());
    }
}
