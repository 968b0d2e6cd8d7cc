//! Strangers, and requests for certificates.

use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use skerry_proto::link::enrolment_client::EnrolmentClient;
use skerry_proto::link::{
    ConfirmRequest, EdgeBulk, EdgeControl, JoinRequest, JoinResponse, RenewRequest, TunnelFrame,
};
use skerry_tests::hostile::{answer, client, stranger as stranger_at, stream};
use skerry_tests::process::text;
use skerry_tests::runner::Test;
use skerry_tests::site::{Runtime, Site};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Book, hostile, run};

pub(super) fn stranger(t: &Test<'_>) {
    let link = t.cluster.link();
    let mut book = Book::default();
    run(async {
        let channel = stranger_at(link).await.unwrap();
        let mut calls = client(&channel);
        let words = "needs a site's certificate";
        let nobody = Code::Unauthenticated;
        let (_c, control) = stream(vec![EdgeControl::default()]);
        book.refused("Control", answer(calls.control(control)).await, nobody, words);
        let (_b, bulk) = stream(vec![EdgeBulk::default()]);
        book.refused("Bulk", answer(calls.bulk(bulk)).await, nobody, words);
        let (_t, tunnel) = stream(vec![TunnelFrame::default()]);
        book.refused("Tunnel", answer(calls.tunnel(tunnel)).await, nobody, words);
        book.refused(
            "Renew",
            answer(calls.renew(RenewRequest::default())).await,
            nobody,
            words,
        );
        book.refused(
            "Confirm",
            answer(calls.confirm(ConfirmRequest {})).await,
            nobody,
            words,
        );
        for (attack, bytes) in [
            ("plain HTTP", &b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..]),
            ("HTTP/2 without TLS", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            (
                "TLS records of nothing",
                &[0x16, 3, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            ),
            ("noise", &[0xa5; 4096]),
        ] {
            let mut tcp = TcpStream::connect(link).await.unwrap();
            // Closed before everything was sent, perhaps.
            let _ = tcp.write_all(bytes).await;
            let mut said = Vec::new();
            let _ = tcp.read_to_end(&mut said).await;
            // A TLS alert at most.
            let quiet = said.len() <= 7 && said.first().is_none_or(|kind| *kind == 0x15);
            book.expect(attack, if quiet { Ok(()) } else { Err(format!("{said:?}")) });
        }
    });
    book.close(9);
}

/// A request for names that it may not have.
fn greedy(victim: &str) -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, victim);
    let id = format!("spiffe://skerry.local/site/{victim}");
    params.subject_alt_names = vec![
        SanType::URI(id.try_into().unwrap()),
        SanType::DnsName("kubernetes.default.svc".try_into().unwrap()),
    ];
    params.serialize_request(&key).unwrap().der().to_vec()
}

/// Names and powers of the certificate in an answer.
fn granted(answer: &JoinResponse) -> (Vec<String>, bool) {
    let der = answer.certificates_der.first().expect("a certificate");
    let (_, certificate) = X509Certificate::from_der(der).expect("a certificate");
    let names = certificate.subject_alternative_name().unwrap().expect("names");
    let names = names.value.general_names.iter().map(|name| match name {
        GeneralName::URI(uri) => (*uri).to_owned(),
        other => format!("{other:?}"),
    });
    (names.collect(), certificate.is_ca())
}

async fn join(channel: &Channel, site: &str, token: &str, csr: &[u8]) -> Result<JoinResponse, Status> {
    let request = JoinRequest {
        site: site.to_owned(),
        token: token.to_owned(),
        csr_der: csr.to_vec().into(),
    };
    answer(EnrolmentClient::new(channel.clone()).join(request))
        .await
        .map(tonic::Response::into_inner)
}

pub(super) fn requests(t: &Test<'_>) {
    let site = Site::prepare(t.cluster, &t.name("new"), Runtime::Process);
    let name = site.name();
    t.cluster.declare(name);
    let token = t.cluster.token(name, &[]);
    let victim = t.site().name();
    let csr = greedy(victim);
    let mut broken = csr.clone();
    *broken.last_mut().unwrap() ^= 1;
    let (_thief_site, thief) = hostile(t);
    let own = |site: &str| vec![format!("spiffe://skerry.local/site/{site}")];
    let mut book = Book::default();
    run(async {
        let channel = stranger_at(t.cluster.link()).await.unwrap();
        let (wrong, denied) = (Code::InvalidArgument, Code::PermissionDenied);
        for (attack, named, secret, request, code, words) in [
            ("no token", name, "", &csr[..], wrong, "not a join token"),
            (
                "a token of a megabyte",
                name,
                &"x".repeat(1_000_000),
                &csr,
                wrong,
                "not a join token",
            ),
            (
                "a token that was changed",
                name,
                &token.replace("skerry1.", "skerry2."),
                &csr,
                wrong,
                "not a join token",
            ),
            ("another site's name", victim, &token, &csr, denied, "is for site"),
            (
                "a path for a name",
                "../../x",
                &token,
                &csr,
                denied,
                "is for site",
            ),
            ("no name", "", &token, &csr, denied, "is for site"),
            ("no request", name, &token, &[][..], wrong, "cannot be read"),
            (
                "a request that is noise",
                name,
                &token,
                &[0x30, 0x82, 0xff, 0xff, 1],
                wrong,
                "cannot be read",
            ),
            (
                "a request without its end",
                name,
                &token,
                &csr[..csr.len() / 2],
                wrong,
                "cannot be read",
            ),
            (
                "a request with a wrong signature",
                name,
                &token,
                &broken,
                wrong,
                "cannot be",
            ),
            (
                "a request of 100 kB",
                name,
                &token,
                &[0x30; 100_000],
                wrong,
                "too large",
            ),
        ] {
            book.refused(attack, join(&channel, named, secret, request).await, code, words);
        }
        for (attack, request) in [
            ("no request to renew", &[][..]),
            ("noise to renew", &[0x30, 1]),
            ("a wrong signature to renew", &broken),
        ] {
            let request = RenewRequest {
                csr_der: request.to_vec().into(),
            };
            let outcome = answer(client(&thief.channel().await).renew(request)).await;
            book.refused(attack, outcome, wrong, "cannot be");
        }
        // A renewal for another is one's own.
        let request = RenewRequest {
            csr_der: csr.clone().into(),
        };
        let renewed = answer(client(&thief.channel().await).renew(request))
            .await
            .unwrap()
            .into_inner();
        assert_eq!(granted(&renewed), (own(&t.name("hostile")), false));
        // Many at once with one token: one wins. None of the refusals before has used it up.
        let race = (0..8).map(|_| join(&channel, name, &token, &csr));
        let won: Vec<_> = futures::future::join_all(race)
            .await
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(won.len(), 1, "one token, one certificate");
        assert_eq!(granted(&won[0]), (own(name), false));
    });
    book.close(14);
    // What was said of sites in vain has not made the token's Site anybody's.
    let out = site.join(&token);
    assert!(
        !out.status.success() && text(&out).contains("token"),
        "{}",
        text(&out)
    );
}
